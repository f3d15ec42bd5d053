"""Two versions of a schedule's JSON: the older one wherever it can say the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import RAMPED, SIGMAS

from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule, ScheduleError
from qsched_core.solvers import SOLVERS
from qsched_core.trajectory import Candidate, StepSolver, Trajectory

solvers = st.sampled_from(list(SOLVERS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {}, optional={option.name: st.floats(0, 1) for option in SOLVERS[name].options}
    ).map(lambda options: StepSolver(name, options))
)


def with_trajectory(*steps: StepSolver, **provenance) -> QSchedule:
    return QSchedule(Trajectory(SIGMAS, True, steps), RAMPED.correction, provenance)


def version(schedule: QSchedule) -> int:
    return json.loads(schedule.to_json())["version"]


@given(st.lists(solvers, min_size=4, max_size=4))
def test_any_solver_in_any_step_comes_back(steps):
    schedule = with_trajectory(*steps)
    again = QSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert [step.name for step in again.trajectory.solvers] == [step.name for step in steps]
    assert again.to_json() == schedule.to_json()


def test_what_version_1_can_say_it_says():
    """Older nodes read it: one solver, whose options are in the provenance or its defaults."""
    options = {"sampling": {"options": {"gamma": 0.5}}}
    assert version(with_trajectory(StepSolver("tcd"))) == 1
    assert version(with_trajectory(StepSolver("tcd", {"gamma": 0.5}), **options)) == 1
    assert version(with_trajectory(StepSolver("tcd", {"gamma": 0.5}))) == 2
    assert version(with_trajectory(StepSolver("tcd", {"gamma": 0.2}), **options)) == 2
    mixed = with_trajectory(*[StepSolver("euler")] * 3, StepSolver("dpmpp_2m"))
    assert version(mixed) == 2 and mixed.solver == "euler+dpmpp_2m"


def test_version_1_tells_its_options_in_the_provenance_alone():
    content = json.loads(with_trajectory(StepSolver("tcd")).to_json())
    content["provenance"] = {"sampling": {"options": {"gamma": 0.7}}}
    assert QSchedule.from_json(json.dumps(content)).trajectory.options == {"gamma": 0.7}
    for odd in ({"gamma": 7}, {"eta": 0.5}, "gamma", None):  # somebody's own notes
        content["provenance"] = {"sampling": {"options": odd}}
        assert QSchedule.from_json(json.dumps(content)).trajectory.options == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"solvers": []}, "solvers=[] must be a list"),
        ({"solvers": [{"name": "euler"}] * 3}, "solvers has 3 entries for 4 steps"),
        ({"solvers": [{"name": "heun"}]}, "solver='heun' is unknown"),
        ({"solvers": ["euler"]}, "solver='euler' must be an object"),
        ({"solvers": [{"name": "tcd", "options": {"gamma": 2}}]}, "gamma=2"),
        ({"solvers": [{"name": "tcd", "options": [1]}]}, "options=[1] of tcd"),
        ({"solvers": [{"name": "euler", "order": 2}]}, "'order' is no field of the solver"),
        ({"flow": None}, "flow=None"),
        ({"sigmas": [0.5, 0.9]}, "decrease"),
        ({"levels": 4}, "'levels' is no field of the trajectory"),
    ],
)
def test_an_invalid_trajectory_is_named(change, named):
    content = json.loads(with_trajectory(StepSolver("tcd", {"gamma": 0.5})).to_json())
    content["trajectory"] |= change
    with pytest.raises(ScheduleError) as error:
        QSchedule.from_json(json.dumps(content))
    assert named in str(error.value)


def test_steps_and_corrections_go_together():
    with pytest.raises(ScheduleError, match="2 steps and the trajectory 4"):
        QSchedule(RAMPED.trajectory, ScalarCorrection((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(ScheduleError, match="c_x has 2 values and c_eps 1"):
        ScalarCorrection((1.0, 1.0), (1.0,))


def test_candidates_are_told_apart_by_trajectory_and_correction():
    one = Candidate.identity(RAMPED.trajectory)
    same = Candidate.identity(Trajectory.of(list(SIGMAS)))
    other = Candidate.identity(replace(RAMPED.trajectory, solvers=(StepSolver("lcm"),)))
    assert one == same and len({one, same, other}) == 2
    assert one.is_identity and not RAMPED.candidate.is_identity


def test_a_schedule_of_several_solvers_says_which_step_has_which():
    mixed = with_trajectory(*[StepSolver("euler")] * 3, StepSolver("dpmpp_2m"))
    head, *lines = mixed.describe().splitlines()
    assert head.startswith("euler+dpmpp_2m, 4 steps")
    assert [line.split()[-1] for line in lines] == ["euler"] * 3 + ["dpmpp_2m"]
    assert "euler" not in with_trajectory(StepSolver("euler")).describe().partition("\n")[2]


def test_a_model_of_the_other_kind_is_refused():
    flow = with_trajectory(StepSolver("euler"))
    flow.check_flow(True)
    with pytest.raises(ScheduleError, match="learned for a flow model but this is an epsilon"):
        flow.check_flow(False)


def test_how_a_run_differs_from_what_was_learned():
    tcd = StepSolver("tcd", {"gamma": 0.5})
    one, unknown = Trajectory(SIGMAS, True, (tcd,)), Trajectory.of(SIGMAS, "tcd")
    assert one.differences("euler") == "solver 'tcd', not 'euler'"
    assert one.differences("tcd") == one.differences("tcd", {"gamma": 0.5}) == ""
    assert one.differences("tcd", {}) == "gamma 0.5, not 0.3"
    assert unknown.differences("tcd", {"gamma": 0.5}) == ""
    several = Trajectory(SIGMAS, True, (StepSolver("tcd"), tcd, tcd, tcd))
    assert several.differences("tcd", {"gamma": 0.5}) == "gamma 0.3 and 0.5, not 0.5"
