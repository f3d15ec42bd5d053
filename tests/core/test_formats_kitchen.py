"""The formats on comfy-kitchen's kernels: its own numbers, bounds, and where they can run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_formats import BOUNDS as OTHER_BOUNDS
from torch import nn

from qsched_core import formats
from qsched_core.formats import FormatError, base, blocks
from qsched_core.formats.base import quantize_tokens
from qsched_core.formats.kitchen import Place, hadamard, pack_int4, rotate, unpack_int4
from qsched_core.formats.module import quantize_module
from qsched_core.formats.w4a4 import int4_tokens

tensor = pytest.importorskip("comfy_kitchen.tensor")

# Relative error of a Gaussian weight and of the layer's output; bits a weight at [1024, 2048].
BOUNDS = {
    "int8_convrot": (0.0085, 0.013, 8.02),
    "w4a4": (0.152, 0.216, 4.02),
    "w4a8_convrot": (0.075, 0.075, 4.52),
    "svdquant_w4a4": (0.098, 0.147, 5.02),
    "fp8_e4m3": (0.027, 0.0385, 8.001),
    "nvfp4": (0.096, 0.136, 4.51),
    "mxfp8": (0.027, 0.0385, 8.26),
}
# Arguments of comfy-kitchen's own quantizer that make the same format.
NATIVE = {
    "int8_convrot": {"per_channel": True, "convrot": True},
    "w4a4": {},
    "fp8_e4m3": {"scale": "recalculate"},  # ComfyUI, where it was imported too, has another default
    "nvfp4": {},
    "mxfp8": {},
}


def _where_it_is(name: str):
    """The format's name; skipped where the installed comfy-kitchen is too old for it."""
    old = formats.get(name).available("cpu") if name == "w4a8_convrot" else None
    return pytest.param(name, marks=pytest.mark.skipif(bool(old), reason=str(old)))


ALL = pytest.mark.parametrize("name", [_where_it_is(name) for name in BOUNDS])
EVERY_NATIVE = pytest.mark.parametrize("name", NATIVE)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def same(a, b) -> bool:
    return same_bits(a.codes, b.codes) and all(same_bits(a.aux[k], b.aux[k]) for k in a.aux)


def layout_of(name: str) -> str:
    """comfy-kitchen's class; ComfyUI registers its fp8 under a name of its own."""
    return formats.get(name).native.layout.replace("FP8E4M3", "FP8")


def kitchen_tensor(name: str, weight: torch.Tensor):
    kwargs = dict(NATIVE[name])
    options = formats.get(name)._options(tuple(weight.shape))
    if "convrot_groupsize" in options:
        kwargs["convrot_groupsize"] = options["convrot_groupsize"]
    return tensor.QuantizedTensor.from_float(weight, layout_of(name), **kwargs)


def as_kitchen(name: str, packed, dtype=torch.float32):
    """The tensor that a host makes of a packing."""
    layout = layout_of(name)
    params = tensor.get_layout_class(layout).Params(
        orig_dtype=dtype, orig_shape=packed.shape, **packed.aux, **packed.options
    )
    return tensor.QuantizedTensor(packed.codes, layout, params)


def test_every_format_has_bounds():
    assert set(formats.names()) == {*BOUNDS, *OTHER_BOUNDS}
    assert not set(BOUNDS) & set(OTHER_BOUNDS)


@ALL
def test_error_and_bits_are_as_stated(name):
    weight, x = gaussian(1024, 2048) * 0.03, gaussian(256, 2048, seed=1)
    form, (weight_bound, output_bound, bits) = formats.get(name), BOUNDS[name]
    packed = form.quantize(weight, measure=True)
    error = relative(form.dequantize(packed), weight)
    assert 0.8 * weight_bound < error < weight_bound
    assert packed.error == pytest.approx(error, rel=1e-4)
    assert 0.8 * output_bound < relative(form.linear(x, packed), x @ weight.T) < output_bound
    assert form.bits <= packed.bits <= bits
    assert packed.nbytes == form.packed_bytes(tuple(weight.shape))


@pytest.mark.parametrize("shape", [(32, 64), (160, 320), (96, 4608)])
@ALL
def test_size_is_known_without_packing(name, shape):
    form = formats.get(name)
    assert form.packed_bytes(shape) == form.quantize(gaussian(*shape)).nbytes


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_of_every_precision_and_shape(name, dtype):
    form, weight = formats.get(name), gaussian(64, 512) * 0.03
    packed, bias = form.quantize(weight), gaussian(64, seed=2)
    x = gaussian(3, 512, 40, seed=1).to(dtype).transpose(1, 2)  # not contiguous
    out = form.linear(x, packed, bias.to(dtype))
    assert out.dtype == dtype and out.shape == (3, 40, 64)
    assert relative(out, x.float() @ weight.T + bias) < BOUNDS[name][1] * 1.05
    row = form.linear(x[0, 0], packed)  # without a dimension of rows
    assert row.shape == (64,)
    assert relative(row, x[0, 0].float() @ weight.T) < BOUNDS[name][1] * 1.3
    assert form.linear(x[:0], packed).shape == (0, 40, 64)
    plain = form.linear(x, packed, bias.to(dtype), weight_only=True)
    assert relative(plain, F.linear(x.float(), form.dequantize(packed), bias)) < 0.005


@EVERY_NATIVE
def test_codes_and_scales_are_those_of_comfy_kitchen(name):
    weight = gaussian(160, 320) * 0.03
    weight[7, 3] = 0.9
    packed, theirs = formats.get(name).quantize(weight), kitchen_tensor(name, weight)
    assert theirs._qdata.dtype == packed.codes.dtype
    assert same_bits(packed.codes, theirs._qdata)
    for table, ours in packed.aux.items():
        found = getattr(theirs._params, table)
        assert ours.shape == found.shape and ours.dtype == found.dtype
        assert same_bits(ours, found)


@pytest.mark.parametrize("name", ["int8_convrot", "w4a4"])
def test_a_rotation_in_two_steps_moves_few_codes(name):
    """On a CPU a rotation of 256 sums in another order: a value on an edge may go the other way."""
    weight = gaussian(128, 1024) * 0.03
    packed, theirs = formats.get(name).quantize(weight), kitchen_tensor(name, weight)
    scale = theirs._params.scale
    assert torch.allclose(packed.aux["scale"], scale.view(packed.aux["scale"].shape), rtol=1e-5)
    ours, found = packed.codes, theirs._qdata
    if name == "w4a4":
        ours, found = unpack_int4(ours), unpack_int4(found)
    apart = (ours.int() - found.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-4


@EVERY_NATIVE
def test_a_bf16_weight_is_packed_as_well_as_comfy_kitchen_packs_it(name):
    """Ours rotates and scales in fp32, comfy-kitchen in bf16: codes differ, errors hardly."""
    weight = (gaussian(160, 512) * 0.03).bfloat16()
    form, theirs = formats.get(name), kitchen_tensor(name, weight)
    ours = form.dequantize(form.quantize(weight))
    found = theirs.layout_cls.dequantize(
        theirs._qdata,
        theirs._params.__class__(**{**vars(theirs._params), "orig_dtype": torch.float32}),
    )
    assert relative(ours, weight) <= relative(found, weight) * 1.001
    assert relative(ours, found) < BOUNDS[name][0]


@EVERY_NATIVE
def test_comfy_kitchen_computes_our_numbers_from_our_packing(name):
    weight, x, bias = gaussian(96, 320) * 0.03, gaussian(50, 320, seed=1), gaussian(96, seed=2)
    form = formats.get(name)
    packed = form.quantize(weight)
    host = as_kitchen(name, packed)
    assert torch.allclose(host.dequantize(), form.dequantize(packed), atol=1e-6)
    if name in ("fp8_e4m3", "nvfp4", "mxfp8"):  # the host rounds the input itself
        scale = {"scale": torch.tensor(1.0)} if name == "fp8_e4m3" else {}
        x_host = tensor.QuantizedTensor.from_float(x, layout_of(name), **scale)
    else:
        x_host = x
    wanted = F.linear(x_host, host, bias)
    assert relative(form.linear(x, packed, bias), wanted) < 1e-5


def test_comfy_kitchen_computes_our_numbers_of_svdquant():
    weight, x = gaussian(96, 320) * 0.03, gaussian(50, 320, seed=1).bfloat16()
    packed = formats.get("svdquant_w4a4").quantize(weight)
    params = tensor.TensorCoreSVDQuantW4A4Layout.Params(
        orig_dtype=torch.bfloat16, orig_shape=packed.shape, **packed.aux
    )
    host = tensor.QuantizedTensor(packed.codes, "TensorCoreSVDQuantW4A4Layout", params)
    assert torch.equal(formats.get("svdquant_w4a4").linear(x, packed), F.linear(x, host))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int8_convrot", (64, 30), "multiple of 4"),
        ("int8_convrot", (64, 33), "multiple of 4"),
        ("w4a4", (64, 96), "multiple of 64"),
        ("svdquant_w4a4", (64, 96), "multiple of 64"),
        ("fp8_e4m3", (60, 64), "multiples of 16"),
        ("nvfp4", (64, 48), "multiple of 32"),
        ("nvfp4", (40, 64), "out features that are a multiple of 16"),
        ("mxfp8", (48, 64), "out features that are a multiple of 32"),
        ("w4a4", (64, 64, 1, 1), "w4a4 is for linear"),
        ("w4a8_convrot", (64, 40), "multiple of 16"),
        ("svdquant_w4a4", (64, 20, 3, 3), "multiple of 64"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_reason(name, shape, reason):
    with pytest.raises(FormatError, match=reason):
        formats.get(name).quantize(torch.ones(shape))


@pytest.mark.parametrize(
    ("columns", "size"), [(512, 256), (320, 64), (48, 16), (36, 4), (1536, 256)]
)
def test_the_largest_rotation_that_divides_is_taken(columns, size):
    packed = formats.get("int8_convrot").quantize(gaussian(8, columns))
    assert packed.options == {"convrot": True, "convrot_groupsize": size}


def test_svdquant_stores_convolutions():
    form, weight = formats.get("svdquant_w4a4"), gaussian(64, 64, 3, 3)
    packed = form.quantize(weight)
    assert form.dequantize(packed).shape == weight.shape
    assert relative(form.dequantize(packed), weight) < BOUNDS["svdquant_w4a4"][0]


GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize(
    ("name", "cpu", "gpus"),
    [
        ("int8_convrot", True, GPUS),
        ("w4a4", True, ((8, 0), (8, 6), (8, 9))),
        ("svdquant_w4a4", True, GPUS[1:]),
        pytest.param("w4a8_convrot", True, GPUS[1:], marks=_where_it_is("w4a8_convrot").marks),
        ("fp8_e4m3", False, GPUS[3:]),
        ("nvfp4", False, GPUS[5:]),
        ("mxfp8", False, GPUS[5:]),
    ],
)
def test_where_a_format_runs(name, cpu, gpus):
    form = formats.get(name)
    assert (form.refusal(Place("cpu")) is None) == cpu == (form.available("cpu") is None)
    assert tuple(g for g in GPUS if form.refusal(Place("cuda", g)) is None) == gpus
    for at in (Place("cuda"), Place("cuda", (6, 1))):
        reason = form.refusal(at)
        assert reason.startswith(f"{name} needs an sm_") and f"found {at}; " in reason
        assert formats.get(reason.rpartition("choose ")[2])


@pytest.mark.parametrize(
    ("at", "found", "instead"),
    [
        (Place("cuda", (7, 5)), "cuda sm_75", "int4 or int8 activations, by the number of rows"),
        (Place("cuda", (9, 0)), "cuda sm_90", "int4 weights with int8 activations"),
        (Place("cuda", (10, 0)), "cuda sm_100", "int4 weights with int8 activations"),
        (
            Place("cuda", (8, 6), forced_int8=True),
            "cuda sm_86 with COMFY_KITCHEN_FORCE_INT4_INT8_FALLBACK=1",
            "int4 weights with int8 activations",
        ),
        (Place("rocm"), "rocm", "unknown"),
    ],
)
def test_w4a4_says_what_would_run_instead(at, found, instead):
    assert formats.get("w4a4").refusal(at) == (
        f"w4a4 needs an sm_80 to sm_89 GPU or the CPU; found {found}; what would run instead is "
        f"{instead}: choose w4a8"
    )


def test_w4a8_convrot_names_the_version_that_has_it(monkeypatch):
    old = sys.modules["qsched_core.formats.w4a8_convrot"]
    monkeypatch.setattr(old, "_found", lambda: "0.2.26")
    reason = formats.get("w4a8_convrot").available("cpu")
    assert "needs comfy-kitchen 0.2.28 or newer" in reason and "found 0.2.26" in reason
    assert formats.get(reason.rpartition("choose ")[2]).available("cpu") is None


def test_backends_say_what_emulates():
    assert "emulated in int8" in formats.get("w4a4").backend("cpu")
    assert formats.get("svdquant_w4a4").backend("cpu") == (
        "comfy-kitchen eager cpu, int4 emulated in floats"
    )
    for name in ("fp8_e4m3", "nvfp4", "mxfp8"):
        assert "emulated in floats" in formats.get(name).backend("cpu")


WITHOUT = """
import sys
sys.modules["comfy_kitchen"] = None
import torch
from qsched_core import formats
weight = torch.randn(32, 64)
for name in ("int8_convrot", "w4a4", "fp8_e4m3"):
    form = formats.get(name)
    form.linear(weight, form.quantize(weight))
print(formats.get("svdquant_w4a4").available("cpu"))
"""


def test_the_table_loads_without_comfy_kitchen(repo_root):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert "svdquant_w4a4 needs the package comfy_kitchen" in done.stdout
    assert "pip install comfy-kitchen" in done.stdout


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_rotation_is_its_own_inverse_and_has_no_mean_row(size):
    matrix = hadamard(size, torch.device("cpu"), torch.float32)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.sum(1), torch.ones(size), atol=1e-5)
    x = gaussian(5, 2 * size)
    assert torch.allclose(rotate(x, size).view(-1, size), x.view(-1, size) @ matrix, atol=1e-5)
    assert torch.allclose(rotate(rotate(x, size), size), x, atol=1e-5)


def test_rotation_spreads_an_outlier():
    weight, x = gaussian(64, 512) * 0.03, gaussian(100, 512, seed=1)
    x[:, 5] *= 60
    wanted = x @ weight.T
    error = {
        name: relative(formats.get(name).linear(x, formats.get(name).quantize(weight)), wanted)
        for name in ("int8", "int8_convrot")
    }
    assert error["int8_convrot"] < error["int8"] / 2


def test_int4_bytes_are_comfy_kitchens():
    from comfy_kitchen.backends.eager import svdquant

    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    assert torch.equal(pack_int4(codes), svdquant._pack_int4_row_major(codes))
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_w4a4_is_integer_arithmetic():
    form, x = formats.get("w4a4"), gaussian(20, 128)
    packed = form.quantize(gaussian(24, 128, seed=1))
    codes, scale = int4_tokens(rotate(x, 64))
    assert codes.abs().max() == 7
    products = codes.int() @ unpack_int4(packed.codes).int().T
    wanted = products * scale * packed.aux["scale"]
    assert torch.allclose(form.linear(x, packed), wanted, rtol=1e-5, atol=1e-5)


def test_int8_convrot_is_integer_arithmetic():
    form, x = formats.get("int8_convrot"), gaussian(20, 128)
    packed = form.quantize(gaussian(24, 128, seed=1))
    codes, scale = quantize_tokens(rotate(x, 64))
    wanted = (codes.int() @ packed.codes.int().T) * scale * packed.aux["scale"].T
    assert torch.allclose(form.linear(x, packed), wanted, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_of_any_size_round_trip(name, scale):
    form, weight = formats.get(name), (gaussian(64, 128) + 0.5) * scale
    packed = form.quantize(weight)
    assert relative(form.dequantize(packed), weight) < 0.2
    x = gaussian(40, 128, seed=1)
    assert relative(form.linear(x, packed), x @ weight.T) < 0.25


@ALL
def test_zero_and_constant_weights(name):
    form = formats.get(name)
    zeros = torch.zeros(64, 128)
    assert torch.equal(form.dequantize(form.quantize(zeros)), zeros)
    assert torch.equal(form.linear(gaussian(8, 128), form.quantize(zeros)), torch.zeros(8, 64))
    constant = torch.full((64, 128), 0.37)
    assert relative(form.dequantize(form.quantize(constant)), constant) < 0.07


@ALL
def test_tokens_of_zeros_give_the_bias(name):
    form, bias = formats.get(name), gaussian(64)
    x = gaussian(6, 128, seed=1)
    x[2] = 0
    assert torch.allclose(form.linear(x, form.quantize(gaussian(64, 128)), bias)[2], bias)


@ALL
def test_chunks_change_nothing(name, monkeypatch):
    weight = gaussian(320, 128)
    whole = formats.get(name).quantize(weight, measure=True)
    # Some formats' chunks are 128 rows at least.
    for module in (base, blocks, sys.modules["qsched_core.formats.svdquant_w4a4"]):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 128 * 7)
    parts = formats.get(name).quantize(weight, measure=True)
    if name == "svdquant_w4a4":  # its branch sums over the chunks: equal but for fp32 rounding
        assert parts.error == pytest.approx(whole.error, rel=1e-3)
        assert (
            relative(formats.get(name).dequantize(parts), formats.get(name).dequantize(whole))
            < 0.02
        )
    else:
        assert same(parts, whole)
        assert parts.error == pytest.approx(whole.error, rel=1e-6)


@ALL
def test_requantizing_keeps_what_did_not_change(name):
    """Baking a LoRA that touches a few rows leaves the others bit-identical."""
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 128))
    weight = form.dequantize(packed)
    assert same_bits(form.quantize(weight, seed=7, like=packed).codes, packed.codes)
    assert torch.equal(form.dequantize(form.quantize(weight, seed=7, like=packed)), weight)
    weight[3] *= 0.8
    again = form.dequantize(form.quantize(weight, seed=7, like=packed))
    others = torch.arange(64) != 3
    assert torch.equal(again[others], weight[others])
    assert relative(again[3], weight[3]) < 0.25


@ALL
def test_a_change_that_does_not_fit_gets_new_scales(name):
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 128))
    weight = form.dequantize(packed)
    weight[3] *= 30
    again = form.dequantize(form.quantize(weight, like=packed))
    assert relative(again[3], weight[3]) < 0.2


@ALL
def test_stochastic_rounding_is_unbiased(name):
    """A change far below a step survives in the mean."""
    form = formats.get(name)
    packed = form.quantize(gaussian(32, 128))
    weight = form.dequantize(packed)
    delta = 0.02 * weight.abs().mean()
    inner = weight.abs() < 0.5 * weight.abs().max()
    baked = [form.dequantize(form.quantize(weight + delta, seed=s, like=packed)) for s in range(40)]
    moved = (torch.stack(baked).mean(0) - weight)[inner].mean() / delta
    assert 0.6 < moved < 1.4
    assert same(form.quantize(weight, seed=3), form.quantize(weight, seed=3))
    other = gaussian(32, 128, seed=9)
    assert not same(form.quantize(other, seed=3), form.quantize(other, seed=4))


@ALL
def test_bad_weights_are_refused(name):
    form = formats.get(name)
    bad = torch.ones(64, 128)
    bad[2, 5] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        form.quantize(bad)
    with pytest.raises(FormatError, match="int32"):
        form.quantize(torch.ones(64, 128, dtype=torch.int32))
    with pytest.raises(FormatError, match=r"packed as \(32, 128\)"):
        form.quantize(torch.ones(64, 128), like=form.quantize(torch.ones(32, 128)))


def test_svdquant_computes_its_equation():
    """(x / smooth in int4) R^T + x proj_down proj_up^T, to the rounding of bf16."""
    form, x = formats.get("svdquant_w4a4"), gaussian(30, 128, seed=1).bfloat16()
    weight, smooth = gaussian(48, 128), gaussian(128, seed=2).abs() + 0.5
    plain = form.quantize(weight)
    smoothed = replace(plain, aux=plain.aux | {"smooth_factor": smooth.bfloat16()})
    packed = form.quantize(weight, like=smoothed)  # as a file of others may have it
    assert relative(form.dequantize(packed), weight) < 0.2
    aux = {name: table.float() for name, table in packed.aux.items()}
    groups = (x / aux["smooth_factor"].bfloat16()).float().view(30, 2, 64)
    step = groups.abs().amax(2, keepdim=True) / 7
    rounded = ((groups / step).round() * step).view(30, 128)
    rest = unpack_int4(packed.codes).float().view(48, 2, 64) * aux["scale"].T.unsqueeze(2)
    wanted = rounded @ rest.view(48, 128).T + x.float() @ aux["proj_down"] @ aux["proj_up"].T
    assert relative(form.linear(x, packed), wanted) < 0.03


def test_the_branch_takes_what_is_of_low_rank():
    weight = gaussian(256, 512) * 0.03
    weight += gaussian(256, 8, seed=1) @ gaussian(8, 512, seed=2)
    form = formats.get("svdquant_w4a4")
    packed = form.quantize(weight)
    assert relative(form.dequantize(packed), weight) < 0.003
    best = torch.linalg.svd(weight)
    best = best.U[:, :32] * best.S[:32] @ best.Vh[:32]
    branch = packed.aux["proj_up"].float() @ packed.aux["proj_down"].float().T
    assert relative(branch, weight) < relative(best, weight) * 1.1
    assert same(form.quantize(weight), packed)


def test_baking_keeps_the_branch():
    form, weight = formats.get("svdquant_w4a4"), gaussian(64, 128)
    packed = form.quantize(weight)
    lora = gaussian(64, 2, seed=1) @ gaussian(2, 128, seed=2) * 0.1
    again = form.quantize(weight + lora, seed=1, like=packed)
    for name in ("proj_up", "proj_down", "smooth_factor"):
        assert same_bits(again.aux[name], packed.aux[name])
    assert relative(form.dequantize(again), weight + lora) < 0.15


@ALL
def test_a_plain_model_runs_quantized(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = gaussian(30, 64)
    wanted = model(x)
    state = quantize_module(model, name).state_dict()
    found = model(x)
    assert 0 < relative(found, wanted) < 2 * BOUNDS[name][1]
    copy = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    quantize_module(copy, name).load_state_dict(state)
    assert torch.equal(copy(x), found)
