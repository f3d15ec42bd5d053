"""The search: its space, and that it finds what is there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import READER, TRAJECTORY
from search_cases import PROMPTS, SMALL, World, outcome, run

from qsched_core.calibration import calibrate
from qsched_core.correction import ScalarCorrection
from qsched_core.search import STRATEGIES, CalibrationSettings
from qsched_core.search.space import RampSpace, StepSpace, grid_points, on_edge
from qsched_core.study import CalibrationError, StudyPlace
from qsched_core.trajectory import Candidate, Trajectory

pytest.importorskip("optuna", reason="the search needs optuna")


def at(*columns, trajectory=None):
    """The candidate with these coefficients."""
    steps = Trajectory.of([1 - i / len(columns[0]) for i in range(len(columns[0]) + 1)])
    return Candidate(trajectory or steps, ScalarCorrection(*columns))


# Space


@given(
    st.lists(st.floats(0.8, 1.2), min_size=1, max_size=8),
    st.floats(0.01, 0.5),
    st.floats(0.8, 1.2),
)
def test_the_per_step_box_holds_its_centre_and_the_base_solver(c_x, radius, eps):
    centre = at(tuple(c_x), (eps,) * len(c_x))
    space = StepSpace(centre, radius)
    assert space.candidate(space.point(centre)) == centre
    one = Candidate.identity(centre.trajectory)
    for point in (space.start, space.point(one)):
        assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
    assert space.candidate(space.point(one)) == one


def test_steps_that_are_not_free_stay_at_the_centre():
    centre = at((1.1, 1.0, 0.9), (0.8, 1.2, 1.0))
    space = StepSpace(centre, free=(2,))
    assert set(space.bounds) == {"c_x[2]", "c_eps[2]"}
    moved = space.candidate({"c_x[2]": 0.95, "c_eps[2]": 1.05})
    assert moved == at((1.1, 1.0, 0.95), (0.8, 1.2, 1.05))


def test_a_ramp_may_end_elsewhere_than_at_1():
    three = at((1.0,) * 3, (1.0,) * 3).trajectory
    space = RampSpace(three, ends=True)
    point = {"c_x start": 1.2, "c_eps start": 0.8, "c_x end": 1.0, "c_eps end": 1.2}
    assert set(space.bounds) == set(point)
    assert space.candidate(point).correction.c_eps == pytest.approx((0.8, 1.0, 1.2))
    assert set(RampSpace(Trajectory.of((1.0, 0.0)), ends=True).bounds) == {
        "c_x start",
        "c_eps start",
    }


@given(st.integers(1, 16), st.floats(0.8, 1.2), st.floats(0.8, 1.2))
def test_a_ramp_starts_at_its_point_and_ends_at_1(steps, x, eps):
    trajectory = at((1.0,) * steps, (1.0,) * steps).trajectory
    correction = RampSpace(trajectory).candidate({"c_x start": x, "c_eps start": eps}).correction
    assert (correction.c_x[0], correction.c_eps[0]) == (x, eps)
    if steps > 1:
        assert correction.c_x[-1] == correction.c_eps[-1] == pytest.approx(1, abs=1e-12)


def test_the_paper_s_grid_is_ten_by_ten_from_end_to_end():
    points = grid_points(RampSpace(TRAJECTORY), 10)
    assert len(points) == len({tuple(p.values()) for p in points}) == 100
    assert {min(p.values()) for p in points[:1]} == {0.8}
    assert tuple(points[-1].values()) == pytest.approx((1.2, 1.2))
    assert on_edge(RampSpace(TRAJECTORY), points[0]) == ["c_x start", "c_eps start"]
    assert on_edge(RampSpace(TRAJECTORY), points[44]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strategy": "magic"}, "search='magic'.*grid"),
        ({"strategy": "gp+steps", "budget": 1}, "budget=1"),
        ({"low": 1.3}, "low=1.3"),
        ({"low": 1.05}, "1, the base solver"),
        ({"high": float("nan")}, "high=nan"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"together": 0}, "together=0"),
    ],
)
def test_settings_that_can_not_work_are_refused_by_name(change, says):
    with pytest.raises(CalibrationError, match=says):
        CalibrationSettings(**change)


# Search


@pytest.mark.parametrize("budget", [4, 15])
def test_a_grid_with_free_ends_needs_two_values_in_each_of_four_dimensions(budget):
    with pytest.raises(CalibrationError, match=f"budget={budget} .*ends free.* at least 16"):
        CalibrationSettings("grid", budget, ends=True)
    assert CalibrationSettings("grid", budget).budget == budget


def test_the_smallest_grid_with_free_ends_runs(tmp_path):
    result = run(World(), tmp_path, CalibrationSettings("grid", 16, ends=True))
    assert len(result.trials) == 1 + 16


# what dynamic programming proposes is not searched for, and this model does not see noise levels
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "levels-dp"])
def test_a_strategy_makes_its_budget_of_trials_from_1_on_and_helps(name, tmp_path):
    seen = []
    world = World()
    result = run(world, tmp_path, CalibrationSettings(name, SMALL[name]), on_trial=seen.append)
    assert len(result.trials) == len(seen) == 1 + SMALL[name]
    assert result.baseline.candidate == Candidate.identity(TRAJECTORY)
    assert result.winner.value == max(t.value for t in result.trials)
    assert [p.trial for p in seen] == list(result.trials)
    assert {p.total for p in seen} == {len(result.trials)} and seen[-1].seconds_left == 0
    assert [p.best.value for p in seen] == sorted(p.best.value for p in seen)
    assert sum(world.calls) == len(result.trials) + 2  # and two on held-out prompts
    assert result.verdict.kind == "helps"
    assert result.schedule.candidate == result.best
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_default_grid_has_a_hundred_candidates_and_1(tmp_path):
    assert len(run(World(), tmp_path, CalibrationSettings("grid")).trials) == 101
    odd = run(World(), tmp_path, CalibrationSettings("grid", 25))
    assert len(odd.trials) == 25  # its middle is 1, which is not tried twice


def test_the_gaussian_process_beats_the_grid_with_a_quarter_of_its_trials(tmp_path):
    grid = run(World(), tmp_path, CalibrationSettings("grid"))
    ramp = run(World(), tmp_path, CalibrationSettings("gp"))
    assert len(ramp.trials) == 25
    assert ramp.winner.value >= grid.winner.value


def test_single_steps_find_what_no_ramp_has(tmp_path):
    ramp = run(World(noise=0.005), tmp_path, CalibrationSettings("gp", 15))
    steps = run(World(noise=0.005), tmp_path, CalibrationSettings("gp+steps", 40))
    stages = [t.stage for t in steps.trials]
    counts = [stages.count(f"step {i + 1}") for i in range(4)]
    assert stages == ["ramp"] * 16 + [f"step {i + 1}" for i in range(4) for _ in range(counts[i])]
    assert sum(counts) == 25 and counts == sorted(counts)  # later steps cost less
    assert steps.heldout.mean > ramp.heldout.mean


def test_it_runs_where_gradients_are_off_as_in_a_node(tmp_path):
    settings = CalibrationSettings("gp", 11)
    with torch.inference_mode():
        result = run(World(), tmp_path / "off", settings)
    assert outcome(result) == outcome(run(World(), tmp_path / "on", settings))


def test_a_one_step_model_can_be_calibrated(tmp_path):
    world = World(ScalarCorrection((1.05,), (0.95,)), trajectory=Trajectory.of((1.0, 0.0)))
    result = run(world, tmp_path, CalibrationSettings("gp+steps", 10))
    assert result.winner.value > result.baseline.value


@pytest.mark.parametrize("together", [1, 3, 100])
def test_how_many_are_evaluated_together_changes_nothing_but_the_batches(together, tmp_path):
    world = World()
    settings = CalibrationSettings("gp", 11, together=together)
    result = run(world, tmp_path / "a", settings)
    assert max(world.calls[:-1]) == min(together, 5)  # the last are the held-out prompts
    assert outcome(result) == outcome(run(World(), tmp_path / "b", replace(settings, together=4)))


def test_costs_add_up_to_what_the_model_did(tmp_path):
    world = World()
    result = run(world, tmp_path)
    assert result.nfe == world.nfe > 0
    again = run(world, tmp_path)
    assert again.nfe == result.nfe
    assert again.seconds == result.seconds


def test_scores_that_do_not_fit_are_refused(tmp_path):
    class Short(type(READER)):
        def score(self, images, prompts):
            return super().score(images[1:], prompts)

    settings, place = CalibrationSettings("grid", 16), StudyPlace(tmp_path)
    with pytest.raises(CalibrationError, match="candidates of 10 prompts"):
        calibrate(World(), Short(), PROMPTS, settings, place)
