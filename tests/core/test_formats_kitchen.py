"""The formats on comfy-kitchen's kernels: its own numbers, bounds, and where they can run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kitchen_cases import ALL, BOUNDS, gaussian, relative, same_bits, where_it_is
from test_formats import BOUNDS as OTHER_BOUNDS

from qsched_core import formats
from qsched_core.formats import FormatError
from qsched_core.formats.base import quantize_tokens
from qsched_core.formats.kitchen import Place, hadamard, pack_int4, rotate, unpack_int4
from qsched_core.formats.w4a4 import int4_tokens

tensor = pytest.importorskip("comfy_kitchen.tensor")

# Arguments of comfy-kitchen's own quantizer that make the same format.
NATIVE = {
    "int8_convrot": {"per_channel": True, "convrot": True},
    "w4a4": {},
    "fp8_e4m3": {"scale": "recalculate"},  # ComfyUI, where it was imported too, has another default
    "nvfp4": {},
    "mxfp8": {},
}


EVERY_NATIVE = pytest.mark.parametrize("name", NATIVE)


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
        pytest.param("w4a8_convrot", True, GPUS[1:], marks=where_it_is("w4a8_convrot").marks),
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
