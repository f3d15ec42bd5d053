"""Calibrated rounding of one layer: what it promises of every format with a grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from qsched_core.formats import get, names
from qsched_core.formats.base import FormatError
from qsched_core.rounding import (
    GRIDS,
    REASONS,
    Gathering,
    RoundingError,
    RoundingSettings,
    calibrate_layer,
    grid_of,
    refusal,
)
from qsched_core.rounding.moments import damping
from qsched_core.rounding.solve import descend, error_to, gptq, refit

ROWS, OUT, IN = 400, 48, 192
NAMES = tuple(GRIDS)
FINE = ("int8", "int8_convrot")  # at 8 bits there is nearly nothing to repair but the inputs' error


def correlated(rows=ROWS, columns=IN, seed=0, noise=0.0):
    """Inputs as a network has them: correlated channels of unequal size, with a mean."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) * torch.logspace(0, -1.5, columns)
    x = torch.randn(rows, columns, generator=random) @ mix.t() * 0.2 + 0.3 * mix[:, 0]
    return x + noise * torch.randn(rows, columns, generator=random)


def layer(columns=IN, seed=1):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, columns, generator=random) * 0.05
    return weight, torch.randn(OUT, generator=random)


def moments(x_q, x_fp=None):
    sums = Gathering()
    for q, fp in zip(x_q.split(100), (x_q if x_fp is None else x_fp).split(100), strict=True):
        sums.add(q, fp)
    return sums.moments()


def fitting(name, columns):
    """The format, if it can pack so many columns."""
    form = get(name)
    if form.unfit((OUT, columns)) is not None:
        pytest.skip(form.unfit((OUT, columns)))
    return form


def left_to_codes(grid, weight):
    """What of a weight its codes stand for, in their basis."""
    turned = grid.turned(weight)
    return turned if grid.apart is None else turned - grid.apart


def output_error(form, found, bias, x_q, goal):
    return float((form.linear(x_q, found, bias) - goal).square().mean())


@pytest.mark.parametrize("columns", [IN, 200])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_output_errs_less_than_plain_rounding_on_the_calibration_inputs(
    name, has_bias, columns
):
    grid, form = grid_of(name), fitting(name, columns)
    weight, bias = layer(columns)
    bias = bias if has_bias else None
    x_fp = correlated(columns=columns)
    x_q = x_fp + 0.05 * correlated(columns=columns, seed=5)
    goal = torch.nn.functional.linear(x_fp, weight, bias)
    found = calibrate_layer(grid, weight, bias, moments(*grid.pair(x_q, x_fp)))
    before = output_error(form, form.quantize(weight), bias, x_q, goal)
    after = output_error(form, found.packed, found.bias, x_q, goal)
    assert after < before
    assert found.note == "" and found.error < found.plain_error
    assert (found.bias is None) == (not has_bias)
    if name not in FINE:
        alone = calibrate_layer(grid, weight, bias, moments(*grid.pair(x_fp, x_fp)))
        plainly = output_error(form, form.quantize(weight), bias, x_fp, goal)
        bound = 0.8 if grid.coarse else 0.6  # most of the rest is the inputs' error
        assert output_error(form, alone.packed, alone.bias, x_fp, goal) < bound * plainly


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_on_inputs_that_it_never_saw(name):
    grid, form = grid_of(name), get(name)
    weight, bias = layer()
    whole = correlated(2 * ROWS)
    seen, unseen = whole[::2], whole[1::2]
    found = calibrate_layer(grid, weight, bias, moments(*grid.pair(seen, seen)))
    goal = torch.nn.functional.linear(unseen, weight, bias)
    before = output_error(form, form.quantize(weight), bias, unseen, goal)
    after = output_error(form, found.packed, found.bias, unseen, goal)
    assert after < (1.0 if name in FINE else 0.8) * before


@pytest.mark.parametrize("name", NAMES)
def test_with_inputs_that_say_nothing_it_is_no_worse_than_plain_rounding(name):
    """Independent inputs of one size: the output error is the weight's."""
    form = get(name)
    weight, _ = layer()
    grid = grid_of(name).fitted(weight)
    plain = left_to_codes(grid, form.dequantize(form.quantize(weight)))
    weight = left_to_codes(grid, weight)
    found = gptq(grid, weight, torch.eye(IN, dtype=torch.float64), 0.01).values()
    assert (found - weight).square().sum() <= (plain - weight).square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("columns", [IN, 200])
@pytest.mark.parametrize("name", NAMES)
def test_the_packing_is_the_formats_own(name, columns):
    form = fitting(name, columns)
    weight, _ = layer(columns)
    grid = grid_of(name).fitted(weight)
    x = grid.turned(correlated(columns=columns))
    rounded = gptq(grid, left_to_codes(grid, weight), moments(x).h, 0.01)
    packed, plain = rounded.packed(), form.quantize(weight)
    stored = left_to_codes(grid, form.dequantize(packed))
    torch.testing.assert_close(stored, rounded.values(), rtol=1e-5, atol=1e-6)
    assert packed.nbytes == plain.nbytes and packed.shape == plain.shape
    for one, other in (
        (packed.codes, plain.codes),
        *zip(packed.aux.values(), plain.aux.values(), strict=True),
    ):
        assert one.dtype == other.dtype and one.shape == other.shape
    assert tuple(packed.aux) == tuple(plain.aux)


@pytest.mark.parametrize("name", ["int2", "nf4", "w4a8"])
def test_descent_never_raises_the_error_and_refit_lowers_that_of_unstored_tables(name):
    grid = grid_of(name)
    weight, _ = layer()
    h = moments(correlated()).h
    with damping(h, 0.01):
        safe = h.float()
    start = gptq(grid, weight, h, 0.01)
    down = descend(start, weight, safe, 2)
    assert error_to(weight, down.values(), safe) <= error_to(weight, start.values(), safe)
    exact = grid_of("int8")
    rows = gptq(exact, weight, h, 0.01)
    fitted = refit(rows, weight, safe)  # its scales are stored exactly
    assert error_to(weight, fitted.values(), safe) <= error_to(weight, rows.values(), safe)


def test_gptq_carries_errors_over_to_columns_that_can_make_up_for_them():
    """Each input is there twice: only the sum of its two weights matters, and one of them errs."""
    weight, _ = layer(64)
    x = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    found = gptq(grid_of("int2"), weight, moments(x).h, 0.001).values()
    plain = get("int2").dequantize(get("int2").quantize(weight))
    sums = [(v - weight).view(OUT, 2, 32).sum(1).square().sum() for v in (found, plain)]
    assert sums[0] < 0.7 * sums[1]


def test_rounded_activations_are_what_the_statistics_see():
    x = correlated()
    assert not torch.equal(grid_of("w4a8").seen(x), x)
    assert torch.equal(grid_of("w4a8", weight_only=True).seen(x), x)
    assert torch.equal(grid_of("int2").seen(x), x)


def test_the_target_takes_up_what_earlier_layers_lost():
    weight, bias = layer()
    x_fp = correlated(2000)
    x_q = 0.8 * x_fp
    goal = torch.nn.functional.linear(x_fp, weight, bias)
    errors = []
    for target in (0.0, 1.0):
        settings = RoundingSettings(target=target, target_damp=1e-3)
        found = calibrate_layer(grid_of("nf4"), weight, bias, moments(x_q, x_fp), settings)
        errors.append(output_error(get("nf4"), found.packed, found.bias, x_q, goal))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_without_any_information_leave_plain_rounding(name):
    weight, bias = layer()
    plain = get(name).quantize(weight)
    for x in (torch.zeros(50, IN), torch.ones(50, IN) * 0.5):
        found = calibrate_layer(grid_of(name), weight, bias, moments(x))
        assert torch.equal(found.packed.codes, plain.codes) and found.note
        assert torch.equal(found.bias, bias)


@pytest.mark.parametrize("name", NAMES)
def test_singular_inputs_are_no_trouble(name):
    """Fewer rows than columns, and channels that are always zero."""
    weight, bias = layer()
    x = correlated(20)
    x[:, 7] = x[:, 64:128] = 0
    grid = grid_of(name)
    found = calibrate_layer(grid, weight, bias, moments(*grid.pair(x, x)))
    assert torch.isfinite(get(name).dequantize(found.packed)).all()
    goal = torch.nn.functional.linear(x, weight, bias)
    form = get(name)
    assert output_error(form, found.packed, found.bias, x, goal) <= output_error(
        form, form.quantize(weight), bias, x, goal
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zeros_stays_zero(name):
    weight = torch.zeros(OUT, IN)
    found = calibrate_layer(grid_of(name), weight, None, moments(correlated()))
    assert not get(name).dequantize(found.packed).any()


def test_what_is_not_finite_is_refused():
    weight, bias = layer()
    x = correlated()
    x[3, 5] = torch.nan
    with pytest.raises(RoundingError, match="NaN or infinite on some of the states"):
        calibrate_layer(grid_of("int2"), weight, bias, moments(x))
    weight[0, 0] = torch.inf
    with pytest.raises(FormatError, match="NaN or infinite"):
        calibrate_layer(grid_of("int2"), weight, bias, moments(correlated()))


def test_inputs_of_two_shapes_and_none_at_all_are_refused():
    with pytest.raises(RoundingError, match=r"\[4, 8\].*\[5, 8\]"):
        Gathering().add(torch.ones(4, 8), torch.ones(5, 8))
    with pytest.raises(RoundingError, match="no inputs"):
        Gathering().moments()


def test_moments_do_not_depend_on_the_batches():
    x_fp, x_q = correlated(), correlated(seed=3)
    whole, parts = Gathering(), Gathering()
    whole.add(x_q, x_fp)
    for a, b in zip(x_q.split(7), x_fp.split(7), strict=True):
        parts.add(a, b)
    one, other = whole.moments(), parts.moments()
    torch.testing.assert_close(one.h, other.h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        one.cross, x_fp.double().t() @ x_q.double() / ROWS, rtol=1e-5, atol=1e-6
    )
    assert one.rows == ROWS
    centred = one.centred()
    torch.testing.assert_close(
        centred.h, torch.cov(x_q.double().t(), correction=0), rtol=1e-4, atol=1e-5
    )


def test_every_format_is_calibrated_or_says_why_not():
    assert set(GRIDS) | set(REASONS) == set(names())
    for name in names():
        assert (refusal(name) is None) == (name in GRIDS)
    with pytest.raises(RoundingError, match=r"'fp8_e4m3' can't be calibrated: .*table.*int2"):
        grid_of("fp8_e4m3")
    with pytest.raises(FormatError, match="unknown"):
        grid_of("int5")


@pytest.mark.parametrize("wrong", [{"damp": 0}, {"target": 2}, {"rounds": -1}, {"sweeps": 1000}])
def test_settings_check_themselves(wrong):
    with pytest.raises(RoundingError, match=next(iter(wrong))):
        RoundingSettings(**wrong)


GROUP = 64


@examples(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_the_nearest_level_is_nearest_and_stored_tables_stay_as_they_are(name, seed, size):
    form, random = get(name), torch.Generator().manual_seed(seed)
    grid = grid_of(name)
    levels = torch.tensor(grid.levels)
    values = torch.randn(3, GROUP, generator=random) * levels.abs().max()
    found = grid.nearest(values)
    away = (values.unsqueeze(2) - levels).abs().amin(2)
    torch.testing.assert_close((found - values).abs(), away, rtol=1e-5, atol=1e-5)
    weight = torch.randn(4, GROUP, generator=random) * size
    common = grid.common(weight)
    tables = grid.fit(weight.unsqueeze(1), torch.ones(1, GROUP), common)
    scale, zero = grid.stored(tables, common)
    again = grid.stored(grid.store(scale, zero, common), common)
    for one, other in zip(again, (scale, zero), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert all(len(table) == 4 for table in tables.values()), form.name


@examples(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.sampled_from([64, 192, 256]))
def test_turning_weights_and_inputs_changes_no_product(name, seed, columns):
    random = torch.Generator().manual_seed(seed)
    grid = grid_of(name)
    weight, x = (torch.randn(rows, columns, generator=random) for rows in (5, 7))
    found = grid.turned(x) @ grid.turned(weight).t()
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if get(n).low_bit_activations])
def test_the_statistics_see_the_inputs_that_the_kernels_multiply(name):
    """The format's product is that of its dequantized weight and the inputs as they are seen."""
    form, x = get(name), correlated(60)
    weight = layer()[0]
    packed = form.quantize(weight)
    grid = grid_of(name).fitted(weight)
    codes = left_to_codes(grid, form.dequantize(packed))
    wanted = grid.seen(x) @ codes.t()
    if grid.apart is not None:
        wanted += x @ grid.apart.t()
    error = (form.linear(x, packed) - wanted).norm() / wanted.norm()
    bound = 0.01 if name == "svdquant_w4a4" else 1e-4  # comfy-kitchen's product there is in bf16
    assert error < bound
