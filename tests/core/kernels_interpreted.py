"""The Triton kernel in Triton's interpreter: test_kernels.py runs this file in a process of its own.

TRITON_INTERPRET=1 has to be set before Triton is imported.  What torch computes on a CPU is the
reference, and fp32 and fp16 are equal to it bit for bit.  The interpreter cuts off what is below a
bf16 where a GPU rounds, so for bf16 the fp32 value without its low bits is what it must give.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks._shapes import LAYERS
from qsched_core import formats
from qsched_core.devices import Place
from qsched_core.formats import bnb4
from qsched_core.formats.base import Packed
from qsched_core.formats.module import quantize_module
from qsched_core.formats.policy import Policy
from qsched_core.kernels import engines

NAMES = ("int2", "int3", "w4a8", "nf4", "fp4")
ALL = pytest.mark.parametrize("name", NAMES)
ROWS = 2  # of a real layer
SHAPES = sorted({shape[1:] for layers in LAYERS.values() for shape in layers})


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(values: torch.Tensor) -> torch.Tensor:
    """fp32 values as bf16, cut off."""
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def check(name: str, packed: Packed) -> None:
    form = formats.get(name)
    wanted = form.unpack_by("torch", packed, torch.float32)
    for dtype in (torch.float32, torch.float16):
        found = form.unpack_by("triton", packed, dtype)
        assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))
    assert torch.equal(form.unpack_by("triton", packed, torch.bfloat16), cut(wanted))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if this CPU were an RTX 4090 that has Triton and no bitsandbytes."""
    monkeypatch.setattr(engines, "place", lambda device: Place("cuda", (8, 9)))
    monkeypatch.setattr(bnb4, "has_kernel", lambda: False)
    engines._chosen.cache_clear()
    engines._try_triton.cache_clear()
    yield
    engines._chosen.cache_clear()
    engines._try_triton.cache_clear()


@ALL
@pytest.mark.parametrize("inner", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_real_layers_have_torchs_values(name, inner):
    """Every width of seven families, two filters or rows of each."""
    check(name, formats.get(name).quantize(gaussian(ROWS, *inner) * 0.02))


@ALL
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_has_torchs_values(name, rows, columns, scale, seed):
    check(name, formats.get(name).quantize(gaussian(rows, columns, seed=seed) * scale))


@pytest.mark.parametrize("name", ["int2", "nf4"])
def test_every_fp8_scale_is_decoded(name):
    """Of a damaged file too: negative, subnormal and NaN."""
    form = formats.get(name)
    packed = form.quantize(gaussian(256, 1))
    scale = torch.arange(256, dtype=torch.uint8).view(-1, 1).view(torch.float8_e4m3fn)
    packed = Packed(packed.codes, {**packed.aux, "scale": scale}, packed.shape)
    found, wanted = (
        form.unpack_by(engine, packed, torch.float32) for engine in ("triton", "torch")
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert wanted.isnan().sum() == 2


@ALL
def test_rows_of_a_packing_and_tables_that_lie_oddly_in_memory(name):
    form = formats.get(name)
    packed = form.quantize(gaussian(40, 96))
    check(name, packed.rows(slice(3, 17)))
    odd = {k: _moved(v) if v.ndim else v for k, v in packed.aux.items()}
    check(name, Packed(_moved(packed.codes), odd, packed.shape))


def _moved(table: torch.Tensor) -> torch.Tensor:
    """The same table as columns of a wider one, from an odd address on."""
    size = table.element_size()
    wide = torch.zeros(table.shape[0], table.shape[1] + 3, dtype=table.dtype)
    wide[:, 1:-2] = table
    assert wide.storage_offset() == 0 and wide[:, 1:-2].data_ptr() % (2 * size) == size
    return wide[:, 1:-2]


@ALL
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(name, on_a_gpu):
    """The first choice of an engine, and its trial, fall into the tracing."""
    torch._dynamo.reset()  # a function is compiled at most eight times
    layer = quantize_module(nn.Sequential(nn.Linear(128, 64)), Policy(name, min_weights=0))
    engines._chosen.cache_clear()
    engines._try_triton.cache_clear()
    x, graphs = gaussian(20, 128), []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1 and "qsched.unpack" in graphs[0]
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), layer(x))


@ALL
def test_the_operator_is_sound_for_compilers(name):
    """Its schema, its fake and what it returns agree."""
    form = formats.get(name)
    spec, packed = form.grouped_codes, form.quantize(gaussian(6, 150))
    aux = packed.aux
    args = (
        packed.codes, spec.bits, spec.levels, spec.zero_steps, spec.least_scale, aux["scale"],
        aux["scale_2"], aux.get("zero"), 150, torch.float16,
    )  # fmt: skip
    # The schema's check multiplies what it is given, which fp8 can't be on a CPU.
    checks = ("test_schema", "test_faketensor") if name == "w4a8" else ("test_faketensor",)
    torch.library.opcheck(torch.ops.qsched.unpack.default, args, test_utils=checks)


@ALL
def test_the_backend_says_who_unpacks(name, on_a_gpu):
    form = formats.get(name)
    assert form.backend("cpu") == "triton cpu"
    weight = gaussian(64, 96)
    packed = form.quantize(weight, measure=True)
    x = gaussian(5, 96, seed=1)
    wanted = form.unpack_by("torch", packed, torch.float32)
    assert torch.equal(form.dequantize(packed), wanted)
    torch.testing.assert_close(form.linear(x, packed, weight_only=True), x @ wanted.T)


@pytest.mark.parametrize("broken", ["raises", "wrong"])
def test_a_kernel_that_does_not_work_here_is_not_used(broken, on_a_gpu, monkeypatch, caplog):
    def unpack(*arguments):
        if broken == "raises":
            raise RuntimeError("Failed to find C compiler")
        return torch.zeros(1, 32)

    monkeypatch.setattr(engines, "unpack", unpack)
    name, refused = engines.choose(Place("cuda", (8, 9)), torch.float16, torch.device("cpu"))
    assert name == "torch"
    words = {"raises": "Failed to find C compiler", "wrong": "wrong values"}[broken]
    assert words in refused["triton"]
    assert formats.get("int2").backend("cpu") == "torch cpu"
