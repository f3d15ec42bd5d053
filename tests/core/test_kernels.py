"""Which engine unpacks packed weights where, and the Triton kernel: interpreted, and compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsched_core import formats, kernels
from qsched_core.devices import Place
from qsched_core.kernels import engines

RTX_4090, H200, RTX_2080 = (Place("cuda", number) for number in ((8, 9), (9, 0), (7, 5)))
TRITON = importlib.util.find_spec("triton") is not None
WITH_TRITON = pytest.mark.skipif(not TRITON, reason="needs Triton, which torch brings on Linux")
GROUPED = ("int2", "int3", "w4a8", "nf4", "fp4")
POINTERS = {"codes": "*u8", "scale_2": "*fp32", "zero": "*u8"}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@WITH_TRITON
def test_in_tritons_interpreter():
    """Every format and shape, equal to torch's: see kernels_interpreted.py."""
    file = Path(__file__).with_name("kernels_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--full"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"\d{3} passed", done.stdout)


@pytest.mark.parametrize("at", [RTX_4090, H200, Place("cuda", (8, 0)), Place("cuda", (12, 0))])
def test_triton_serves_every_gpu_from_sm80_on(at, monkeypatch):
    monkeypatch.setattr(engines, "missing", lambda *_: None)
    for dtype in engines.DTYPES:
        assert kernels.choose(at, dtype) == ("triton", {})


@pytest.mark.parametrize(
    ("at", "dtype", "words"),
    [
        (Place("cpu"), torch.float16, "for NVIDIA GPUs; found cpu"),
        (Place("rocm"), torch.float16, "for NVIDIA GPUs; found rocm"),
        (Place("mps"), torch.float16, "for NVIDIA GPUs; found mps"),
        (Place("cuda"), torch.float16, "sm_80 or newer GPU; found cuda without a GPU"),
        (RTX_2080, torch.float16, "sm_80 or newer GPU; found cuda sm_75"),
        (RTX_4090, torch.float64, "fp16, bf16 or fp32, not torch.float64"),
    ],
    ids=str,
)
def test_torch_serves_the_others_and_the_reason_is_given(at, dtype, words):
    name, refused = kernels.choose(at, dtype)
    assert name == "torch"
    assert words in refused["triton"]


def test_without_triton_the_reason_has_the_command(monkeypatch):
    reason = "the fast kernel needs the package triton, ...; run: pip install triton"
    monkeypatch.setattr(engines, "missing", lambda *_: reason)
    assert kernels.choose(RTX_4090, torch.float16) == ("torch", {"triton": reason})


def test_the_reason_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(engines, "place", lambda device: RTX_2080)
    engines._chosen.cache_clear()
    for _ in range(3):
        assert kernels.engine(torch.device("cuda"), torch.float16) == "torch"
    engines._chosen.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "torch unpacks weights instead of triton: Triton needs an sm_80 or newer GPU; found cuda sm_75"
    ]


@pytest.mark.parametrize("name", GROUPED)
def test_a_cpu_unpacks_by_torch_or_bitsandbytes(name):
    wanted = ("bitsandbytes cpu", "torch cpu") if name in ("nf4", "fp4") else ("torch cpu",)
    assert formats.get(name).backend("cpu") in wanted
    assert formats.get(name).backend("meta") in ("bitsandbytes meta", "torch meta")


@pytest.mark.parametrize("bits", [1, 5])
def test_codes_of_other_sizes_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be 2, 3 or 4"):
        kernels.GroupedCodes(bits, (0.0,))
    with pytest.raises(ValueError, match="levels has 3 values"):
        kernels.GroupedCodes(2, (0.0, 1.0, 2.0))


def compiled(name: str, dtype: torch.dtype, capability: int) -> str:
    """The kernel's PTX; Triton's assembler makes a program for the GPU of it, which needs none."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from qsched_core.kernels import triton_unpack

    form, kernel = formats.get(name), triton_unpack.unpack_kernel
    packed = form.quantize(torch.randn(8, 256))
    scale = packed.aux["scale"]
    chosen = triton_unpack.arguments(form.grouped_codes, packed.codes, scale, 256)
    kinds = POINTERS | {
        "scale": "*u8" if scale.dtype == torch.float8_e4m3fn else "*fp16",
        "out": f"*{DTYPES[dtype]}",
    }
    types = {n: "constexpr" if n in chosen else kinds.get(n, "i32") for n in kernel.arg_names}
    index = kernel.arg_names.index
    whole = {(index(n),): [["tt.divisibility", 16]] for n in kinds}
    source = ASTSource(kernel, types, {(index(n),): v for n, v in chosen.items()}, whole)
    options = {"num_warps": triton_unpack.WARPS, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@WITH_TRITON
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("name", GROUPED)
def test_it_compiles_for_every_generation_of_gpus(name, capability):
    """What the interpreter can not show: values are rounded as torch does, and memory is read whole."""
    for dtype, kind in DTYPES.items():
        text = compiled(name, dtype, capability)
        assert "fma.rn" not in text and "div.full" not in text and "div.approx" not in text
        assert "st.global.v4.b32" in text  # 16 bytes a thread and instruction
        if dtype != torch.float32:
            short = kind.replace("fp", "f")
            assert f"cvt.rn.{short}x2.f32" in text and "cvt.rz" not in text
