"""The search of noise levels: its box, and what it finds on a model whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_levels import EVEN, distance, searched

from qsched_core.correction import ScalarCorrection
from qsched_core.search import CalibrationSettings
from qsched_core.search.space import LevelSpace
from qsched_core.sigmas import log_snr, sigma_of
from qsched_core.trajectory import Candidate, Trajectory

NOISY = Trajectory.of((14.6, 4.0, 1.2, 0.4, 0.0), flow=False)
OWN = ScalarCorrection((1.1, 0.9, 1.0, 1.0), (0.95, 1.0, 1.0, 3.9))


def space(trajectory=EVEN, lowest=0.02, correction=None, **more):
    centre = Candidate(trajectory, correction or ScalarCorrection.identity(trajectory.steps))
    return LevelSpace(centre, lowest, **more)


@pytest.mark.parametrize("flow", [True, False])
@given(value=st.floats(-9, 9))
def test_a_noise_level_is_known_by_its_log_snr(flow, value):
    assert log_snr(sigma_of(value, flow), flow) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("trajectory", [EVEN, NOISY], ids=["flow", "epsilon"])
@given(shares=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_every_point_is_a_trajectory_in_the_models_range(trajectory, shares):
    box = space(trajectory, ends=True)
    assert list(box.bounds) == [
        "level", "gap 2", "gap 3", "c_x start", "c_eps start", "c_x end", "c_eps end",
    ]  # fmt: skip
    point = {
        name: low + (high - low) * share
        for (name, (low, high)), share in zip(box.bounds.items(), shares, strict=True)
    }
    sigmas = box.candidate(point).trajectory.sigmas
    assert (sigmas[0], sigmas[-1]) == (trajectory.sigmas[0], trajectory.sigmas[-1])
    assert sigmas[-2] >= 0.02 and all(a > b for a, b in pairwise(sigmas))


def test_the_start_is_the_centre_itself_and_gaps_are_in_log_snr():
    box = space(correction=OWN)
    assert box.candidate(box.start) == box.centre
    moved = box.candidate(box.start | {"level": 0.5, "gap 2": 1.0}).trajectory.sigmas
    before = [log_snr(sigma, True) for sigma in EVEN.sigmas[1:-1]]
    after = [log_snr(sigma, True) for sigma in moved[1:-1]]
    assert after[0] - before[0] == pytest.approx(0.5)
    assert after[1] - after[0] == pytest.approx(2 * (before[1] - before[0]))
    assert after[2] - after[1] == pytest.approx(before[2] - before[1])


def test_the_ramp_multiplies_the_centres_numbers_within_their_limits():
    box = space(correction=OWN)
    found = box.candidate(box.start | {"c_x start": 1.2, "c_eps start": 1.1}).correction
    assert found.c_x[0] == pytest.approx(1.1 * 1.2) and found.c_x[-1] == 1.0
    assert found.c_eps == pytest.approx((0.95 * 1.1, 1 + 0.2 / 3, 1 + 0.1 / 3, 3.9))
    wide = space(correction=OWN, ends=True)
    assert wide.candidate(wide.start | {"c_eps end": 1.2}).correction.c_eps[-1] == 4.0


def test_a_trajectory_of_one_step_has_its_ramp_alone():
    box = space(Trajectory.of((1.0, 0.0)))
    assert list(box.bounds) == ["c_x start", "c_eps start"]
    assert box.candidate(box.start | {"c_x start": 1.1}).trajectory.sigmas == (1.0, 0.0)


def test_levels_at_the_end_of_the_range_stay_apart():
    box = space(NOISY, lowest=0.39)
    last = box.candidate(dict.fromkeys(box.bounds, 1.0)).trajectory.sigmas
    assert all(math.log(a / b) > 0.009 for a, b in pairwise(last[:-1]))
    assert last[-2] >= 0.39


@pytest.mark.parametrize("name", ["levels-gp", "levels-dp+gp"])
def test_a_search_of_levels_and_ramp_comes_nearer_on_unseen_samples(name, tmp_path):
    result = searched(tmp_path, CalibrationSettings(name, 24))
    assert result.verdict.kind == "helps"
    assert result.schedule.trajectory.sigmas != EVEN.sigmas
    assert distance(result.schedule.candidate) < 0.6 * distance(Candidate.identity(EVEN))
    assert len(result.trials) == 25
    assert result.baseline.candidate == Candidate.identity(EVEN)
