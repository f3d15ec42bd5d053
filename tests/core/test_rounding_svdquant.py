"""svdquant_w4a4 rounded for its inputs: the branch, and inputs that are rounded to 0 .. 15."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen import tensor
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsched_core.formats import get
from qsched_core.formats.base import FormatError
from qsched_core.formats.layer_entry import check_tables
from qsched_core.formats.policy import Choice
from qsched_core.formats.svdquant_w4a4 import SHIFT, UNSIGNED
from qsched_core.rounding import Gathering, RoundedWeights, calibrate_layer, grid_of
from qsched_core.rounding.layer import Calibrated

FORM = get("svdquant_w4a4")
OUT, IN = 48, 128


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def behind_gelu(rows=600, seed=2):
    mix = gaussian(IN, IN, seed=9) * torch.logspace(0.3, -0.7, IN)
    return F.gelu(gaussian(rows, IN, seed=seed) @ mix.t() * 0.3, approximate="tanh")


def calibrated(x, weight=None, bias=None, grid=None):
    weight = gaussian(OUT, IN, seed=1) * 0.05 if weight is None else weight
    bias = gaussian(OUT, seed=3) if bias is None else bias
    grid = grid_of("svdquant_w4a4").suited(x) if grid is None else grid
    sums = Gathering()
    sums.add(*grid.pair(x, x))
    return calibrate_layer(grid, weight, bias, sums.moments()), weight, bias


def relative(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize(
    ("x", "unsigned"),
    [
        (behind_gelu(), True),
        (F.relu(gaussian(50, IN)), True),
        (gaussian(50, IN), False),
        (F.silu(2 * gaussian(50, IN)), False),  # goes down to -0.28
        (gaussian(50, IN) * 0.01, False),  # never below, but the shift would dwarf it
    ],
    ids=["gelu", "relu", "any", "silu", "tiny"],
)
def test_inputs_that_never_go_below_a_gelus_minimum_are_rounded_without_a_sign(x, unsigned):
    found, _, _ = calibrated(x)
    assert found.packed.options == ({UNSIGNED: True} if unsigned else {})
    grid = grid_of("svdquant_w4a4", weight_only=True)
    assert not grid.looks and grid.suited(x) is grid


def test_sixteen_levels_err_less_than_fifteen_around_zero():
    x, unseen = behind_gelu(), behind_gelu(seed=5)
    errors = []
    for grid in (grid_of("svdquant_w4a4"), None):
        found, weight, bias = calibrated(x, grid=grid)
        out = FORM.linear(unseen, found.packed, found.bias)
        errors.append(relative(out, F.linear(unseen, weight, bias)))
    assert errors[1] < 0.8 * errors[0]


def test_the_shift_is_taken_off_in_the_format_itself():
    """A packing's product is that of its dequantized weight, whatever its inputs are rounded to."""
    x = behind_gelu()
    found, _, _ = calibrated(x, bias=torch.zeros(OUT))
    grid = grid_of("svdquant_w4a4").suited(x)
    down, up = (found.packed.aux[name].float() for name in ("proj_down", "proj_up"))
    branch = up @ down.t()
    rest = FORM.dequantize(found.packed) - branch
    wanted = grid.seen(x) @ rest.t() + x @ branch.t()
    assert relative(FORM.linear(x, found.packed), wanted) < 0.02
    assert relative(FORM.linear(x, found.packed), x @ FORM.dequantize(found.packed).t()) < 0.15
    zero = FORM.linear(torch.zeros(1, IN), found.packed)
    assert zero.abs().max() < 0.02 * wanted.abs().max()
    exact = FORM.linear(x, found.packed, weight_only=True)
    torch.testing.assert_close(exact, x @ FORM.dequantize(found.packed).t(), rtol=1e-4, atol=1e-5)


def test_comfy_kitchen_computes_the_same():
    x = behind_gelu().bfloat16()
    found, _, _ = calibrated(x.float())
    aux, bias = dict(found.packed.aux), found.bias.bfloat16()
    up = aux["proj_up"].clone()
    shift, up[:, -1] = up[:, -1].clone(), 0
    params = tensor.TensorCoreSVDQuantW4A4Layout.Params(
        orig_dtype=torch.bfloat16,
        orig_shape=found.packed.shape,
        act_unsigned=True,
        **aux | {"proj_up": up},
    )
    host = tensor.QuantizedTensor(found.packed.codes, "TensorCoreSVDQuantW4A4Layout", params)
    assert relative(FORM.linear(x, found.packed, bias), F.linear(x, host, bias + shift)) < 0.01


def test_baking_keeps_what_the_inputs_are_rounded_to():
    x = behind_gelu()
    found, _, _ = calibrated(x)
    before = FORM.dequantize(found.packed)
    lora = gaussian(OUT, 2, seed=6) @ gaussian(2, IN, seed=7) * 0.02
    baked = FORM.quantize(before + lora, seed=1, like=found.packed)
    assert baked.options == {UNSIGNED: True}
    goal = F.linear(x, before + lora, found.bias)
    assert relative(FORM.linear(x, baked, found.bias), goal) < 0.15
    same = FORM.quantize(before, like=found.packed)
    assert torch.equal(same.codes, found.packed.codes)
    assert torch.equal(same.aux["proj_up"], found.packed.aux["proj_up"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.booleans())
@example(0, 0.01171875, True)
def test_rounded_inputs_are_never_more_than_half_a_step_away(seed, size, unsigned):
    x = gaussian(4, IN, seed=seed) * size
    x = x.abs() - SHIFT * 0.9 if unsigned else x
    x = x.bfloat16().float()  # as a model gives them; rounding to that is none of these steps
    grid = type(grid_of("svdquant_w4a4"))(FORM, unsigned=unsigned)
    top = 15 if unsigned else 7
    groups = (x + SHIFT if unsigned else x).view(4, -1, 64)
    step = groups.abs().amax(-1, keepdim=True) / top
    wrong = (grid.seen(x).view_as(groups) - x.view_as(groups)).abs()
    assert (wrong <= step * (0.5 + 2**-7 * (top + 1)) + 1e-6).all()


def test_files_keep_the_option_and_refuse_a_wrong_one(tmp_path):
    found, _, _ = calibrated(behind_gelu())
    chosen = {"fc2": Choice("svdquant_w4a4")}
    path = RoundedWeights({"fc2": found}, chosen).save(tmp_path / "w.safetensors")
    again = RoundedWeights.load(path).layers["fc2"].packed
    assert again.options == {UNSIGNED: True}
    x = behind_gelu(seed=8)
    assert torch.equal(FORM.linear(x, again), FORM.linear(x, found.packed))
    wrong = replace(found.packed, options={UNSIGNED: "yes"})
    with pytest.raises(FormatError, match=r"file: layer 'fc2': act_unsigned is 'yes'"):
        check_tables(wrong, FORM, "fc2", "file")
    hostile = RoundedWeights({"fc2": Calibrated(wrong, None)}, chosen)
    with pytest.raises(FormatError, match="act_unsigned"):
        RoundedWeights.load(hostile.save(tmp_path / "wrong.safetensors"))
