"""The search of a solver for each step: its box, its study, and what it finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_levels import EVEN, UNSEEN, searched

from benchmarks._mixture import MixtureSource, Nearness
from qsched_core.calibration.report import report_text
from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule
from qsched_core.search import CalibrationSettings
from qsched_core.search.space import SolverSpace, on_edge
from qsched_core.search.trajectories import SINGLES, solver_menu
from qsched_core.solvers import SOLVERS
from qsched_core.study.journal import Journal, distributions
from qsched_core.study.store import Record
from qsched_core.trajectory import Candidate, StepSolver, Trajectory

MENU = solver_menu(EVEN)
SPACE = SolverSpace(EVEN, MENU)


def test_the_menu_begins_with_the_trajectorys_own_and_has_one_evaluation_a_step():
    own = StepSolver("tcd", {"gamma": 0.7})
    menu = solver_menu(Trajectory(EVEN.sigmas, True, (own,)))
    assert menu[0] == own and len(menu) == len(MENU) + 1
    assert MENU[0].name == "euler" and len({step.name for step in MENU}) == len(MENU)
    for step in MENU:
        trajectory = Trajectory(EVEN.sigmas, True, (step,))
        source = MixtureSource(trajectory)
        source.images(UNSEEN, [Candidate.identity(trajectory)])
        assert source.nfe == 4 * len(UNSEEN)
    assert {step.name for step in MENU} <= set(SOLVERS)


@given(st.lists(st.integers(0, len(MENU) - 1), min_size=3, max_size=3), st.floats(0.8, 1.2))
def test_a_point_names_a_solver_for_each_step(places, start):
    point = SPACE.start | {f"solver {i + 1}": float(k) for i, k in enumerate(places)}
    found = SPACE.candidate(point | {"c_x start": start})
    assert [MENU.index(step) for step in found.trajectory.solvers] == [*places, 0]
    assert found.correction == ScalarCorrection.ramp({"c_x": (start, 1.0)}, 4)
    assert not on_edge(SPACE, point | {"c_x start": 1.0})
    partial = SolverSpace(Trajectory.of((1.0, 0.5, 0.25)), MENU)
    assert partial.choices == ("solver 1", "solver 2", "corrector 1")


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.floats(0.5, 1.5))
def test_a_point_says_what_is_corrected_and_how_much_of_the_step_before_counts(on, history):
    names = [step.name for step in MENU]
    chosen = [names.index(name) for name in ("euler", "lms_2", "lcm")]
    point = SPACE.start | {f"solver {i + 1}": float(k) for i, k in enumerate(chosen)}
    point |= {f"corrector {i + 1}": float(k) for i, k in enumerate(on)} | {"c_1": history}
    first, second, third, last = SPACE.candidate(point).trajectory.solvers
    assert first.options == ({"corrector": 1.0} if on[0] else {})  # it has no step before
    assert second.options.get("corrector", 0.0) == on[1]
    assert second.options.get("c_1", 1.0) == history
    assert third.options == {} and last == EVEN.solvers[-1]  # lcm has neither


def test_a_step_to_0_may_only_have_what_is_more_than_the_prediction_there():
    (low, high) = SPACE.bounds["solver 4"]
    found = [SPACE.candidate(SPACE.start | {"solver 4": k}).trajectory for k in (low, high)]
    assert [t.solvers[-1].name for t in found] == ["euler", "lms_2"]
    assert "corrector 4" not in SPACE.bounds
    alone = SPACE.candidate(SPACE.single([step.name for step in MENU].index("lms_2")))
    assert {step.name for step in alone.trajectory.solvers} == {"lms_2"}


def test_the_start_is_the_base_solver():
    assert SPACE.candidate(SPACE.start) == Candidate.identity(EVEN)


def test_a_choice_is_kept_as_one_in_the_study(tmp_path):
    """Parzen estimators and Gaussian processes must not take neighbours in the menu for alike."""
    found = distributions(SPACE)
    assert found["solver 1"].choices == tuple(float(k) for k in range(len(MENU)))
    assert found["solver 4"].choices == found["corrector 1"].choices == (0.0, 1.0)
    assert (found["c_x start"].low, found["c_x start"].high) == (0.8, 1.2)
    scores = Nearness().score(
        MixtureSource(EVEN).images(UNSEEN, [Candidate.identity(EVEN)])[0], UNSEEN.prompts
    )
    point = SPACE.single(2)
    with Journal(tmp_path, "a") as journal, journal.claim("solvers", SPACE, {0: point}) as claim:
        claim.finish(Record(0, point, scores, 0.0, 1))
    with Journal(tmp_path, "a") as journal:
        assert dict(journal.records("solvers")[0].point) == point


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("solvers"), CalibrationSettings("solvers", 24))


def test_the_search_begins_with_every_single_solver(result):
    first = [trial.candidate for trial in result.trials[: SINGLES - 1]]
    assert all(candidate.is_identity for candidate in first)
    names = [candidate.trajectory.solvers[0].name for candidate in first]
    able = [step.name for step in MENU if step.solver.corrector is not None]
    assert names == [step.name for step in MENU] + able
    corrected = [c.trajectory.solvers[0].options.get("corrector") for c in first]
    assert corrected == [None] * len(MENU) + [1.0] * len(able)


def test_a_mix_that_helps_is_a_schedule_of_its_own_solvers(result):
    assert result.verdict.kind == "helps" and len(result.trials) == 25
    best = result.schedule.trajectory
    assert not best.is_uniform
    assert best.sigmas == EVEN.sigmas
    assert QSchedule.from_json(result.schedule.to_json()) == result.schedule
    assert all(step.name in report_text(result) for step in best.solvers)
    singles = result.trials[: SINGLES - 1]
    assert result.winner.value >= max(trial.value for trial in singles)
    told = result.schedule.provenance["best_trajectory"]
    assert Trajectory.from_json(told) == best
