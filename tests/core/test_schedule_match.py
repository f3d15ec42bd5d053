"""Coefficients at other sigmas than the learned ones: they belong to the noise level."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from schedule_cases import RAMPED, SIGMAS, scalar_schedule, schedules

from qsched_core.schedule import QSchedule, ScheduleError
from qsched_core.sigmas import log_snr


@given(schedules())
def test_learned_sigmas_get_exactly_their_own_coefficients(schedule):
    match = schedule.at(schedule.sigmas, "strict")
    assert (match.correction.c_x, match.correction.c_eps) == (
        schedule.correction.c_x,
        schedule.correction.c_eps,
    )
    assert match.note == ""


@given(schedules(apart=0.02), st.data())
def test_a_part_of_the_steps_gets_the_same_coefficients(schedule, data):
    """start_at_step, end_at_step, and img2img, which enters in the middle."""
    start = data.draw(st.integers(0, schedule.steps - 1))
    end = data.draw(st.integers(start + 1, schedule.steps))
    match = schedule.at(schedule.sigmas[start : end + 1], "strict")
    assert match.correction.c_x == schedule.correction.c_x[start:end]
    assert match.correction.c_eps == schedule.correction.c_eps[start:end]
    assert match.note == ""


@given(schedules(apart=0.02), st.floats(-5e-4, 5e-4))
def test_rounding_of_sigmas_does_not_matter(schedule, error):
    match = schedule.at([sigma * (1 + error) for sigma in schedule.sigmas], "strict")
    assert (match.correction.c_x, match.correction.c_eps) == (
        schedule.correction.c_x,
        schedule.correction.c_eps,
    )


@given(schedules(apart=0.02), st.floats(1e-6, 1.0))
def test_other_sigmas_stay_between_their_neighbours(schedule, share):
    sigma = share * schedule.sigmas[0]
    known = schedule.sigmas[:-1]
    assume(not any(math.isclose(sigma, value, rel_tol=2e-3) for value in known))
    match = schedule.at((sigma, 0.0))
    assert "1 of 1 step have a sigma that was not learned" in match.note
    above = max((i for i, value in enumerate(known) if value > sigma), default=0)
    below = min(above + 1, schedule.steps - 1)
    for got, learned in (
        (match.correction.c_x[0], schedule.correction.c_x),
        (match.correction.c_eps[0], schedule.correction.c_eps),
    ):
        low, high = sorted((learned[above], learned[below]))
        assert low <= got <= high
    with pytest.raises(ScheduleError, match="not learned"):
        schedule.at((sigma, 0.0), "strict")


@given(schedules(apart=0.1), st.lists(st.floats(0.01, 1), min_size=2, max_size=12, unique=True))
def test_coefficients_are_monotone_between_two_learned_sigmas(schedule, shares):
    assume(schedule.steps > 1)
    high, low = schedule.sigmas[:2]
    between = sorted({low + (high - low) * share for share in shares}, reverse=True)
    got = [schedule.at((sigma, 0.0)).correction.c_x[0] for sigma in between]
    sign = 1 if schedule.correction.c_x[1] >= schedule.correction.c_x[0] else -1
    assert all(sign * (b - a) >= 0 for a, b in pairwise(got))


@given(schedules(apart=0.1), st.floats(0.05, 0.95))
def test_interpolation_is_linear_in_log_snr(schedule, share):
    assume(schedule.steps > 1)
    a, b = (log_snr(sigma, schedule.flow) for sigma in schedule.sigmas[:2])
    assume(max(abs(a), abs(b)) < 12)  # beyond, a ratio counts as 12: no schedule goes there
    ratio = a + (b - a) * share
    sigma = 1 / (1 + math.exp(ratio)) if schedule.flow else math.exp(-ratio)
    assume(not any(math.isclose(sigma, value, rel_tol=2e-3) for value in schedule.sigmas))
    got = schedule.at((sigma, 0.0)).correction.c_x[0]
    expected = (
        schedule.correction.c_x[0]
        + (schedule.correction.c_x[1] - schedule.correction.c_x[0]) * share
    )
    assert got == pytest.approx(expected, abs=1e-6)


def test_beyond_the_ends_the_last_coefficients_are_held():
    inner = scalar_schedule((0.8, 0.4, 0.2), (1.1, 1.2), (0.9, 0.8))
    correction = inner.at((1.0, 0.6, 0.1, 0.0)).correction
    assert (correction.c_x[0], correction.c_eps[0]) == (1.1, 0.9)
    assert (correction.c_x[2], correction.c_eps[2]) == (1.2, 0.8)


@given(schedules(apart=0.02), st.lists(st.floats(1e-4, 1), min_size=1, max_size=20, unique=True))
def test_the_identity_is_one_everywhere(schedule, shares):
    sigmas = sorted((share * schedule.sigmas[0] for share in shares), reverse=True)
    assume(all(a > b for a, b in pairwise(sigmas)))
    match = QSchedule.identity(schedule.trajectory).at([*sigmas, 0])
    assert set(match.correction.c_x + match.correction.c_eps) == {1.0}


def test_sigmas_closer_than_the_tolerance_keep_their_own():
    close = [1 - i / 5000 for i in range(900)]
    schedule = scalar_schedule([*close, 0.0], [0.5 + i / 900 for i in range(900)], [1.0] * 900)
    assert schedule.at(schedule.sigmas, "strict").correction.c_x == schedule.correction.c_x


def test_another_schedulers_sigmas_are_noted_with_both():
    match = RAMPED.at((1.0, 0.82, 0.5, 0.0))
    assert match.correction.c_x[0] == 1.0
    assert 1.1 < match.correction.c_x[1] < 1.2
    assert "1 of 3 steps have a sigma that was not learned (sigma=0.82;" in match.note
    assert "the schedule has 4 steps at sigma 1, 0.9, 0.75, 0.5" in match.note
    with pytest.raises(ScheduleError, match=r"sigma=0\.82"):
        RAMPED.at((1.0, 0.82, 0.5, 0.0), "strict")


@pytest.mark.parametrize(
    ("sigmas", "told"),
    [
        ((1.0, 0.75, 0.0), "step 1 of 2 goes from sigma 1 to 0.75, and was learned to 0.9"),
        ((1.0, 0.9, 0.0), "step 2 of 2 goes from sigma 0.9 to 0, and was learned to 0.75"),
    ],
)
def test_longer_steps_between_learned_sigmas_are_noted(sigmas, told):
    match = RAMPED.at(sigmas)
    assert match.correction.c_x == tuple(
        RAMPED.correction.c_x[SIGMAS.index(s)] for s in sigmas[:-1]
    )
    assert told in match.note
    assert "the schedule has 4 steps" in match.note
    with pytest.raises(ScheduleError, match="calibrate"):
        RAMPED.at(sigmas, "strict")


@pytest.mark.parametrize(
    "sigmas", [(), (1.0,), (0.5, 1.0), (1.0, 1.0, 0.0), (1.0, math.nan, 0.0), (math.inf, 0.0)]
)
def test_sigmas_that_are_no_trajectory_are_refused(sigmas):
    with pytest.raises(ScheduleError, match="sigmas"):
        RAMPED.at(sigmas)


def test_an_unknown_mode_is_named():
    with pytest.raises(ScheduleError, match="mode='loose'"):
        RAMPED.at(SIGMAS, "loose")
