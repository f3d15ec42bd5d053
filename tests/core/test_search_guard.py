"""The guard: an interval that covers, a verdict that says what the numbers say."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.search import guard
from qsched_core.search.guard import (
    MIN_PROMPTS,
    Interval,
    judge,
    mean_interval,
    paired_interval,
)

UP, ACROSS = Interval(0.1, 0.05, 0.15, 40), Interval(0.1, -0.05, 0.25, 40)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40), st.floats(-5, 5))
def test_the_interval_holds_the_mean_and_moves_with_the_scores(values, shift):
    zeros = [0.0] * len(values)
    one = paired_interval(zeros, values, resamples=200)
    assert one.low <= one.mean + 1e-9 and one.mean <= one.high + 1e-9
    assert one.mean == pytest.approx(np.mean(values), abs=1e-9)
    moved = paired_interval(zeros, [v + shift for v in values], resamples=200)
    assert moved.low == pytest.approx(one.low + shift, abs=1e-6)
    swapped = paired_interval(values, zeros, resamples=200)
    assert swapped.mean == pytest.approx(-one.mean, abs=1e-9)


def test_equal_scores_give_an_interval_of_nothing():
    assert paired_interval([1.0] * 9, [1.0] * 9) == Interval(0.0, 0.0, 0.0, 9)
    assert mean_interval([2.0]) == Interval(2.0, 2.0, 2.0, 1)


def test_pairing_removes_what_prompts_differ_in():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 40)
    gain = paired_interval(base, base + rng.normal(0.1, 0.05, 40))
    assert 0 < gain.low < 0.1 < gain.high < 0.2


@pytest.mark.parametrize("prompts", [MIN_PROMPTS, 16, 64])
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_noise_alone_passes_the_guard_in_at_most_one_of_twenty(prompts, kind):
    rng = np.random.default_rng(prompts)
    runs, passed = 600, 0
    for _ in range(runs):
        draws = rng.normal(size=(prompts, 2)) if kind == "normal" else rng.gumbel(size=(prompts, 2))
        interval = paired_interval(draws[:, 0], draws[:, 1], resamples=1000)
        passed += not judge(UP, interval, True).keep_identity
    assert passed / runs <= 0.05


def test_a_real_gain_passes():
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(100):
        base = rng.normal(5, 0.5, 64)
        interval = paired_interval(base, base + rng.normal(0.04, 0.06, 64), resamples=1000)
        passed += not judge(UP, interval, True).keep_identity
    assert passed >= 95


@pytest.mark.parametrize(
    "calibration,heldout,guard,kind,keep",
    [
        (UP, UP, True, "helps", False),
        (UP, UP, False, "helps", False),
        (UP, ACROSS, True, "overfitted", True),
        (UP, ACROSS, False, "overfitted", False),
        (ACROSS, ACROSS, True, "no effect", True),
        (ACROSS, UP, True, "helps", False),
        (None, None, True, "no effect", True),
        (None, None, False, "no effect", True),
        (UP, Interval(0.1, 0.05, 0.15, MIN_PROMPTS - 1), True, "no effect", True),
    ],
)
def test_the_verdict_says_what_the_numbers_say(calibration, heldout, guard, kind, keep):
    verdict = judge(calibration, heldout, guard)
    assert (verdict.kind, verdict.keep_identity) == (kind, keep)
    assert verdict.text.startswith(kind)
    if heldout is not None:
        assert f"{heldout.mean:+.4f} [{heldout.low:+.4f}, {heldout.high:+.4f}]" in verdict.text
        guarded = "guard keeps c = 1" in verdict.text
        assert guarded == (keep and kind != "helps")


@pytest.mark.parametrize("before,after", [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_too_few_or_unpaired_scores_are_told(before, after):
    with pytest.raises(ValueError, match="give the same number, at least 2"):
        paired_interval(before, after)


def test_any_number_of_prompts_is_resampled_in_bounded_memory():
    gains = np.random.default_rng(0).normal(0.1, 1.0, 30_000)
    tracemalloc.start()
    try:
        found = paired_interval(np.zeros(len(gains)), gains, resamples=300)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48e6  # at once they are 144 MB
    assert found.low < 0.1 < found.high


@pytest.mark.parametrize("block", [1, 100, 101, 2**20])
def test_a_seed_s_resamples_do_not_depend_on_the_blocks(block, monkeypatch):
    values = np.random.default_rng(1).normal(size=33)
    whole = values[np.random.default_rng(5).integers(33, size=(101, 33))].mean(axis=1)
    monkeypatch.setattr(guard, "BLOCK", block)
    found = guard.resampled(values, lambda rows: rows.mean(axis=1), 101, seed=5)
    assert np.array_equal(found, whole)
