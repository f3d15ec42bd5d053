"""Packed codes and their values: against bitsandbytes, against the formulas, on every shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qsched_core import formats
from qsched_core.formats import base, bnb4, tables
from qsched_core.formats.module import quantize_module
from qsched_core.formats.policy import Policy
from qsched_core.formats.tables import group_values, nearest_level, pack, unpack

BITSANDBYTES = pytest.mark.parametrize("name", ["nf4", "fp4"])
AFFINE = pytest.mark.parametrize("name", ["int3", "int2"])
GROUPED = ("nf4", "fp4", "w4a8", "int3", "int2")
CONVOLUTIONS = (*GROUPED, "llm_int8")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def ascending(name: str) -> tuple[float, ...]:
    return tuple(sorted(set(formats.get(name).levels)))


@given(codes=st.lists(st.integers(0, 7), min_size=8, max_size=8))
def test_three_bit_codes_are_a_plain_stream_of_bits(codes):
    stream = int("".join(f"{code:03b}" for code in codes), 2).to_bytes(3, "big")
    assert bytes(pack(torch.tensor([codes]), 3)[0].tolist()) == stream


@BITSANDBYTES
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_nearest_level_is_that_of_bucketize(name, data):
    """Also a rounding step from the middles between levels, and beyond [-1, 1]."""
    levels = ascending(name)
    middles = (torch.tensor(levels)[1:] + torch.tensor(levels)[:-1]) / 2
    drawn = torch.tensor(data.draw(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1)))
    up, down = (torch.nextafter(middles, torch.tensor(end)) for end in (2.0, -2.0))
    values = torch.cat([drawn, middles, up, down])
    assert torch.equal(nearest_level(values, levels).long(), torch.bucketize(values, middles))


@BITSANDBYTES
def test_no_cell_holds_two_middles_or_a_middle_on_its_edge(name):
    """What ``nearest_level`` rests on."""
    levels = torch.tensor(ascending(name), dtype=torch.float64)
    position = ((levels[1:] + levels[:-1]) / 2 + 1) * tables.CELLS / 2
    assert len(set(position.floor().tolist())) == len(position)
    assert (position - position.round()).abs().min() > 0.05


@BITSANDBYTES
def test_codes_are_those_of_bitsandbytes(name):
    """Its own quantizer differs only where the fp8 rounding of a block's magnitude moves a value."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, form = gaussian(64, 256), formats.get(name)
    codes, _ = functional.quantize_4bit(weight, blocksize=64, quant_type=name)
    rank = torch.tensor([ascending(name).index(v) for v in form.levels])
    ours = rank[unpack(form.quantize(weight).codes, 4).int()]
    theirs = rank[unpack(codes.view(64, -1), 4).int()]
    assert (ours == theirs).float().mean() > 0.9
    assert (ours - theirs).abs().max() <= 1


@BITSANDBYTES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_same_without_bitsandbytes(name, dtype, monkeypatch):
    pytest.importorskip("bitsandbytes")
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 200))
    fast = form.dequantize(packed, dtype)
    assert form.backend("cpu") == "bitsandbytes cpu"
    monkeypatch.setattr(bnb4, "has_kernel", lambda: False)
    assert torch.equal(form.dequantize(packed, dtype), fast)
    assert form.backend("cpu") == "torch cpu"


@pytest.mark.parametrize("name", (*GROUPED, "int8", "llm_int8"))
def test_half_precision_values_are_the_fp32_values_rounded_once(name):
    form = formats.get(name)
    packed = form.quantize(gaussian(40, 200))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(form.dequantize(packed, dtype), form.dequantize(packed).to(dtype))


@AFFINE
def test_an_affine_value_is_scale_times_code_minus_zero(name):
    form, weight = formats.get(name), gaussian(16, 96)
    packed = form.quantize(weight)
    codes = unpack(packed.codes, form.code_bits).view(16, 3, 32).float()
    scale = packed.aux["scale"].float() * packed.aux["scale_2"]
    zero = packed.aux["zero"].float() / (255 // form.top)
    wanted = ((codes - zero.unsqueeze(2)) * scale.unsqueeze(2)).view(16, 96)
    assert torch.allclose(form.dequantize(packed), wanted, atol=1e-6)
    assert zero.min() >= 0 and zero.max() <= form.top and codes.max() == form.top


@AFFINE
def test_an_affine_group_of_whole_codes_is_exact(name):
    """Zero is a code's value wherever the zero point is one of the codes."""
    form = formats.get(name)
    codes = torch.arange(32).repeat(8, 2) % (form.top + 1)
    weight = codes.float() - torch.arange(8).remainder(form.top + 1).unsqueeze(1)
    back = form.dequantize(form.quantize(weight))
    assert relative(back, weight) < 0.04  # the scale's own fp8 step
    assert torch.equal(back == 0, weight == 0)


@AFFINE
def test_least_squares_beats_min_and_max(name):
    form, weight = formats.get(name), gaussian(64, 512)
    groups = weight.view(64, -1, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / form.top
    plain = ((groups - low) / scale).round() * scale + low
    ours = relative(form.dequantize(form.quantize(weight)), weight)
    assert ours < 0.93 * relative(plain.view_as(weight), weight)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_blocks_of_rows_change_no_value(name, blocks, monkeypatch):
    monkeypatch.setattr(bnb4, "has_kernel", lambda: False)
    form = formats.get(name)
    packed = form.quantize(gaussian(33, 130))
    whole = form.dequantize(packed)
    monkeypatch.setattr(tables, "CACHE_ELEMENTS", 130 * blocks)
    assert torch.equal(form.dequantize(packed), whole)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_operator_is_sound_for_compilers(bits):
    """Its schema, its fake and what it returns agree."""
    data = torch.randint(0, 256, (6, 3 * 8 * bits), dtype=torch.uint8)
    levels, scale = [float(v) for v in range(2**bits)], gaussian(6, 6).abs()
    for low in (None, gaussian(6, 6)):
        args = (data, levels, bits, scale, low, 150, torch.bfloat16)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(group_values, args, test_utils=checks)


@pytest.mark.parametrize("name", ["nf4", "fp4", "w4a8", "int3", "int2", "int8"])
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(name):
    layer = quantize_module(nn.Sequential(nn.Linear(128, 64)), Policy(name, min_weights=0))
    x = gaussian(20, 128)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@given(
    filters=st.integers(1, 5),
    channels=st.integers(1, 9),
    size=st.sampled_from([(1, 1), (3, 3), (1, 5)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_convolution_is_packed_as_the_matrix_of_its_filters(name, filters, channels, size, seed):
    weight, form = gaussian(filters, channels, *size, seed=seed), formats.get(name)
    packed, flat = form.quantize(weight), form.quantize(weight.flatten(1))
    assert packed.shape == weight.shape
    assert packed.codes.ndim == 2 and torch.equal(packed.codes, flat.codes)
    assert torch.equal(form.dequantize(packed), form.dequantize(flat).view_as(weight))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_runs_on_its_dequantized_weight(name):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 32, 3, stride=2, padding=1), gaussian(2, 16, 9, 9)
    weight = formats.get(name).dequantize(formats.get(name).quantize(conv.weight.detach()))
    wanted = F.conv2d(x, weight, conv.bias, 2, 1)
    layer = quantize_module(nn.Sequential(conv), Policy(name, min_weights=0))
    assert layer[0].format == name
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("name", (*CONVOLUTIONS, "int8"))
@pytest.mark.parametrize("chunks", [1, 7])
def test_a_measured_packing_says_its_relative_error(name, chunks, monkeypatch):
    weight, form = gaussian(63, 512), formats.get(name)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", weight.numel() // chunks)
    packed = form.quantize(weight, measure=True)
    assert packed.error == pytest.approx(relative(form.dequantize(packed), weight), rel=1e-4)
    assert form.quantize(weight).error is None
    assert form.quantize(torch.zeros(8, 64), measure=True).error == 0
