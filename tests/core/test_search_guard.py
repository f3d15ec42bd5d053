"""The guard: an interval that covers, a verdict that says what the numbers say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import skew, t, ttest_1samp

from qsched_core.calibration.guard import MIN_PROMPTS, judge
from qsched_core.statistics import Interval, mean_interval, paired_interval

UP, ACROSS = Interval(0.1, 0.05, 0.15, 40), Interval(0.1, -0.05, 0.25, 40)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40), st.floats(-5, 5))
def test_the_interval_holds_the_mean_and_moves_with_the_scores(values, shift):
    zeros = [0.0] * len(values)
    one = paired_interval(zeros, values)
    assert one.low <= one.mean + 1e-9 and one.mean <= one.high + 1e-9
    assert one.mean == pytest.approx(np.mean(values), abs=1e-9)
    moved = paired_interval(zeros, [v + shift for v in values])
    assert moved.low == pytest.approx(one.low + shift, abs=1e-6)
    swapped = paired_interval(values, zeros)
    assert swapped.mean == pytest.approx(-one.mean, abs=1e-9)


def test_equal_scores_give_an_interval_of_nothing():
    assert paired_interval([1.0] * 9, [1.0] * 9) == Interval(0.0, 0.0, 0.0, 9)
    assert mean_interval([2.0]) == Interval(2.0, 2.0, 2.0, 1)


def test_pairing_removes_what_prompts_differ_in():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 40)
    gain = paired_interval(base, base + rng.normal(0.1, 0.05, 40))
    assert 0 < gain.low < 0.1 < gain.high < 0.2


def share_passed(gains) -> float:
    """Share of the rows of gains [runs, prompts] that the guard lets through."""
    zeros = np.zeros(gains.shape[1])
    verdicts = [judge(UP, paired_interval(zeros, row), True) for row in gains]
    return np.mean([not verdict.keep_identity for verdict in verdicts])


@pytest.mark.parametrize("prompts", [MIN_PROMPTS, 20, 64])
@pytest.mark.parametrize("kind", ["normal", "standard_t", "gumbel"])
def test_noise_alone_passes_the_guard_in_at_most_one_of_twenty(prompts, kind):
    """Differences of two scores that have the same distribution."""
    draw = getattr(np.random.default_rng(prompts), kind)
    more = {"df": 3} if kind == "standard_t" else {}
    before, after = (draw(size=(1500, prompts), **more) for _ in range(2))
    assert share_passed(after - before) <= 0.05


@pytest.mark.parametrize("prompts,sigma", [(20, 0.75), (64, 0.5), (64, 1.0), (128, 1.25)])
def test_few_large_losses_among_many_small_gains_do_not_pass_either(prompts, sigma):
    """Gains of mean 0 with a long tail on the left: what the draw lacks looks like a gain."""
    losses = np.random.default_rng(0).lognormal(0, sigma, (4000, prompts))
    assert share_passed(np.exp(sigma**2 / 2) - losses) <= 0.05


@pytest.mark.parametrize("tail", [-0.4, 0, 0.4])
def test_skewness_costs_little_of_what_a_t_test_finds(tail):
    """Gains as on the demo, .14 with a deviation of .46, at 64 prompts."""
    draws = np.random.default_rng(2).normal(size=(2000, 64))
    if tail:
        sigma = abs(tail)
        draws = np.sign(tail) * (np.exp(sigma * draws) - np.exp(sigma**2 / 2))
        draws /= np.exp(sigma**2 / 2) * np.sqrt(np.expm1(sigma**2))
    gains = 0.14 + 0.46 * draws
    student = ttest_1samp(gains, 0, axis=1, alternative="greater").pvalue <= 0.025
    assert share_passed(gains) >= 0.8 * student.mean()


def test_the_ends_are_the_means_that_johnson_s_test_just_rejects():
    gains, n = np.random.default_rng(3).gumbel(0.1, 1, 128), 128
    found, spread = paired_interval(np.zeros(n), gains), gains.std(ddof=1)
    third = skew(gains, bias=False) * spread**3
    for end, sign in ((found.low, 1), (found.high, -1)):
        away = gains.mean() - end
        modified = away + third / (6 * spread**2 * n) + third / (3 * spread**4) * away**2
        assert sign * modified / spread * n**0.5 == pytest.approx(t.ppf(0.975, n - 1))


def test_a_tail_too_long_to_correct_still_has_a_finite_end():
    gains = [0.1] * 63 + [-2.0]
    found, error = paired_interval([0.0] * 64, gains), np.std(gains, ddof=1) / 8
    assert 4 < (found.mean - found.low) / error < 4.5 and found.high < 0.12


def test_a_real_gain_passes():
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(100):
        base = rng.normal(5, 0.5, 64)
        interval = paired_interval(base, base + rng.normal(0.04, 0.06, 64))
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


@pytest.mark.parametrize("n", [8, 20, 64])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n):
    draw = random.Random(n)
    hits, rounds = 0, 300
    for _ in range(rounds):
        after = [draw.gauss(0.3, 1) for _ in range(n)]
        interval = paired_interval([0.0] * n, after)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.92 <= hits / rounds <= 0.98


def test_the_interval_pairs_prompts():
    before = [10.0 * i for i in range(12)]
    interval = paired_interval(before, [v + 1 for v in before])
    assert interval.low == pytest.approx(1) and interval.high == pytest.approx(1)


def test_too_few_held_out_prompts_prove_nothing():
    gain = Interval(1.0, 0.5, 1.5, 20)
    assert judge(gain, Interval(1.0, 0.5, 1.5, MIN_PROMPTS), True).kind == "helps"
    few = judge(gain, Interval(1.0, 0.5, 1.5, MIN_PROMPTS - 1), True)
    assert few.keep_identity and str(MIN_PROMPTS) in few.text
