"""Noise levels by dynamic programming: its optimum, its fits, and the search that is made of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from search_cases import World, outcome, run

from benchmarks._mixture import MixtureSource, Nearness, noise_of, prompts
from qsched_core.calibration import calibrate
from qsched_core.correction import ScalarCorrection
from qsched_core.prompts import CalibrationPrompts
from qsched_core.schedule import QSchedule
from qsched_core.search import CalibrationSettings, Monitor
from qsched_core.search.course import LEVELS as WALK
from qsched_core.search.levels import LearnedLevels, learned_levels
from qsched_core.sigmas import divided
from qsched_core.solvers import sample_euler
from qsched_core.study import COMMAND_LINE, CalibrationError, StudyPlace
from qsched_core.trajectory import Candidate, Fit, Trajectory, best_paths, edges, square

EVEN = Trajectory.of((1.0, 0.75, 0.5, 0.25, 0.0))
FITTED, UNSEEN = prompts(16, 100), prompts(48, 900)


# Bellman


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_the_paths_are_those_of_brute_force(levels, seed):
    cost = torch.rand(levels, levels + 1, generator=torch.Generator().manual_seed(seed))
    cost = cost.double().masked_fill(torch.ones(levels, levels + 1).tril().bool(), torch.inf)
    found = best_paths(cost, 5)
    assert len(found) == min(5, levels)
    for steps, path in enumerate(found, start=1):
        grids = [(0, *inner, levels) for inner in combinations(range(1, levels), steps - 1)]
        sums = {grid: sum(float(cost[i, j]) for i, j in pairwise(grid)) for grid in grids}
        assert path.positions in sums
        assert path.cost == pytest.approx(min(sums.values()), rel=1e-12)
        assert sums[path.positions] == pytest.approx(path.cost, rel=1e-12)


def test_a_path_of_every_level_is_the_grid():
    cost = square(torch.ones(10), 5)
    assert best_paths(cost)[-1].positions == (0, 1, 2, 3, 4)


# Fits


def random_fit(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, 5, 2, generator=draw, dtype=torch.float64)
    target = scale * torch.randn(3, 5, generator=draw, dtype=torch.float64)
    return basis, target + basis.sum(-1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 20.0]))
def test_the_numbers_are_the_least_squares_in_their_box(seed, scale):
    basis, target = random_fit(seed, scale)
    found, cost = Fit.of(basis, target).solve(ScalarCorrection)
    known = lsq_linear(basis.flatten(0, 1).numpy(), target.flatten().numpy(), (0.25, 4), tol=1e-13)
    assert float(cost) == pytest.approx(2 * known.cost, rel=1e-6, abs=1e-9)
    assert found.numpy() == pytest.approx(known.x, abs=1e-4)


def test_samples_in_parts_are_the_same_fit():
    basis, target = random_fit(3, 1.0)
    whole = Fit.of(basis, target).solve(ScalarCorrection)
    parts = Fit.of(basis[:1], target[:1]) + Fit.of(basis[1:], target[1:])
    for one, two in zip(whole, parts.solve(ScalarCorrection), strict=True):
        torch.testing.assert_close(one, two)


def test_two_columns_that_are_one_have_a_fit():
    """A flow's first prediction may be 0: then latent and velocity are the same."""
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.stack([x, -0.5 * x], dim=-1)
    found, cost = Fit.of(basis, 0.5 * x).solve(ScalarCorrection)
    assert float(cost) == pytest.approx(0, abs=1e-9)
    assert ((found >= 0.25) & (found <= 4)).all()


def test_an_edge_of_one_step_has_no_cost_and_its_numbers_are_1():
    source = MixtureSource(EVEN)
    walk = source.observed(FITTED)
    ends = (*walk.latents, source.images(FITTED, [Candidate.identity(EVEN)])[0].flatten(1))
    fit = edges(ends, walk.outputs, EVEN.sigmas, ScalarCorrection)
    numbers, cost = fit.solve(ScalarCorrection)
    neighbours = [(i, i + 1) for i in range(4)]
    for i, j in neighbours:
        assert square(numbers, 5)[i, j].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert max(float(square(cost, 5)[i, j]) for i, j in neighbours) < 1e-9 * float(fit.energy.max())
    assert float(square(cost, 5)[0, 4]) > 1


@pytest.mark.parametrize("flow", [True, False])
def test_a_trajectory_divided_keeps_its_levels(flow):
    own = (1.0, 0.6, 0.2, 0.0) if flow else (14.6, 4.0, 0.6, 0.0)
    fine = divided(own, 12, flow)
    assert fine[::4] == own
    assert all(a > b for a, b in pairwise(fine))
    assert divided(own, 3, flow) == own


# What it proposes


class Small(MixtureSource):
    max_batch = 5


def distance(candidate, judge=Nearness()):  # noqa: B008  it keeps what it solved
    ends = MixtureSource(candidate.trajectory).images(UNSEEN, [candidate])[0]
    return float(judge.distances(ends, UNSEEN.seeds).mean())


@pytest.fixture(scope="module")
def found():
    return learned_levels(MixtureSource(EVEN), FITTED)


def test_learned_levels_with_their_numbers_come_nearer_on_unseen_samples(found):
    each, rolled, _ = (proposal.candidate for proposal in found.proposals)
    plain = distance(Candidate.identity(EVEN))
    assert distance(rolled) < distance(each) < 0.7 * plain


def test_the_walk_costs_its_grid_a_prompt_and_the_corrected_path_its_steps(found):
    source = MixtureSource(EVEN)
    assert learned_levels(source, prompts(40, 0), 20).nfe == source.nfe == 16 * (20 + 4)
    assert found.nfe == 16 * (32 + 4) and found.grid == 32
    assert len(found.costs) == 16
    assert list(found.costs) == sorted(found.costs, reverse=True)


def test_all_proposals_lie_on_the_fine_path_and_are_plain_json(found):
    fine = MixtureSource(EVEN).fine(32).sigmas
    for proposal in found.proposals:
        assert set(proposal.candidate.trajectory.sigmas) <= set(fine)
        assert proposal.candidate.trajectory.sigmas[0] == 1
        assert proposal.candidate.trajectory.sigmas[-1] == 0
    assert LearnedLevels.from_dict(found.to_dict()) == found


def test_prompts_in_small_batches_give_the_same(found):
    again = learned_levels(Small(EVEN), FITTED)
    for one, two in zip(found.proposals, again.proposals, strict=True):
        assert one.candidate.trajectory == two.candidate.trajectory
        for name, row in one.candidate.correction.rows().items():
            assert two.candidate.correction.rows()[name] == pytest.approx(row, rel=1e-9)


def test_another_solver_gets_the_levels_alone():
    for solver, options, count in (("dpmpp_2m", {}, 1), ("ddim", {"eta": 0.5}, 1), ("ddim", {}, 3)):
        trajectory = Trajectory.of(EVEN.sigmas, solver, options=options)
        proposals = learned_levels(MixtureSource(trajectory), FITTED, 12).proposals
        assert len(proposals) == count
        assert {p.candidate.trajectory.solver for p in proposals} == {solver}
        assert proposals[-1].candidate.is_identity


def test_a_grid_of_the_steps_own_count_is_refused_by_name():
    for grid in (4, 3, 1, 257, -2):
        with pytest.raises(CalibrationError, match=f"grid={grid} must be from 5 to 256"):
            learned_levels(MixtureSource(EVEN), FITTED, grid)


class Quantized(MixtureSource):
    """The mixture, its predictions scaled: what a correction can undo."""

    def __init__(self, trajectory):
        super().__init__(trajectory)
        exact = self.model
        self.model = lambda x, sigma, **_: x + 1.25 * (exact(x, sigma) - x)


def test_with_a_reference_the_steps_of_the_quantized_model_aim_at_its_path():
    """A velocity that is a fourth too large is undone by numbers that are a fifth smaller."""
    source, reference = Quantized(EVEN), MixtureSource(EVEN)
    aware = learned_levels(source, FITTED, reference=reference)
    plain = learned_levels(reference, FITTED)
    assert aware.nfe == 16 * (2 * 32 + 4)
    one, two = (each.proposals[0].candidate for each in (aware, plain))
    assert one.trajectory == two.trajectory
    assert one.correction.c_x == pytest.approx(two.correction.c_x, rel=1e-3)
    smaller = [c / 1.25 for c in two.correction.c_eps]
    assert one.correction.c_eps == pytest.approx(smaller, rel=1e-3)


def test_the_mixtures_denoiser_is_the_mean_of_the_posterior():
    """Against a mean over draws of the mixture, weighted by the likelihood of x."""
    mixture, draw = Nearness().model, np.random.default_rng(0)
    means = mixture.means.numpy()
    x, level = means[3] * 0.4 + 0.6 * draw.normal(size=64) * 0.2, 0.6
    clean = means[3] + 0.25 * draw.normal(size=(200_000, 64))
    logs = -((x - (1 - level) * clean) ** 2).sum(1) / (2 * level**2)
    weights = np.exp(logs - logs.max())
    expected = (weights[:, None] * clean).sum(0) / weights.sum()
    got = mixture(torch.tensor(x)[None], torch.tensor([level]))[0].numpy()
    assert np.abs(got - expected).max() < 0.1
    assert np.abs(got - expected).mean() < 0.03


# The search


LEVELS = CalibrationSettings("levels-dp")
SEARCHED = CalibrationSettings("levels-dp+gp", 9, together=1)


def searched(folder, settings=LEVELS, source=None, reference=None):
    sets = CalibrationPrompts(prompts(12, 100), prompts(24, 900))
    place = StudyPlace(folder)
    return calibrate(source or MixtureSource(EVEN), Nearness(), sets, settings, place, reference)


def test_the_calibrator_returns_levels_of_its_own_that_the_guard_let_through(tmp_path):
    result = searched(tmp_path)
    assert result.verdict.kind == "helps"
    assert result.schedule.trajectory != EVEN and result.schedule.steps == 4
    assert result.baseline.candidate == Candidate.identity(EVEN)
    assert not any(trial.edges for trial in result.trials)
    assert result.schedule.provenance["search"]["levels"]["nfe"] == 12 * (32 + 4)
    assert result.nfe > 12 * 36
    again = QSchedule.from_json(result.schedule.to_json())
    assert again == result.schedule


@pytest.mark.parametrize("reference", [None, MixtureSource(EVEN)], ids=["alone", "reference"])
def test_the_walk_is_a_part_of_the_course_and_moves_with_each_evaluation(tmp_path, reference):
    said, sets = [], CalibrationPrompts(prompts(12, 100), prompts(24, 900))
    calibrate(
        Small(EVEN), Nearness(), sets, LEVELS, StudyPlace(tmp_path), reference,
        Monitor(on_standing=said.append),
    )  # fmt: skip
    walk = [standing for standing in said if standing.part == WALK]
    done = [standing.done for standing in said]
    assert done == sorted(done) and said[-1].done == said[-1].total
    batches = 3 * (32 * (1 if reference is None else 2) + 4)
    assert len({standing.done for standing in walk}) > 0.8 * batches


def test_workers_that_share_a_study_walk_once(tmp_path):
    pytest.importorskip("sqlalchemy", reason="shared studies need sqlalchemy")
    database = COMMAND_LINE.database(f"sqlite:///{tmp_path}/study.db")
    sets = CalibrationPrompts(prompts(12, 100), prompts(24, 900))

    def worker(source, **told):
        place = StudyPlace(tmp_path, database, "levels together")
        return calibrate(source, Nearness(), sets, LEVELS, place, None, Monitor(**told))

    class Second(MixtureSource):
        """Sees the first worker at its walk, and comes back when that is over."""

        walks = 0

        def observed(self, *args, **more):
            Second.walks += 1
            return super().observed(*args, **more)

    class IdleError(Exception):
        pass

    def idle():
        raise IdleError

    class First(MixtureSource):
        def observed(self, *args, **more):
            if self.nfe == 0:
                with pytest.raises(IdleError):
                    worker(Second(EVEN), idle=idle)
            return super().observed(*args, **more)

    first = worker(First(EVEN))
    second = worker(Second(EVEN))
    assert Second.walks == 0
    assert outcome(first) == outcome(second)


def test_a_guarded_schedule_keeps_the_schedulers_levels(tmp_path):
    result = run(World(), tmp_path, LEVELS)
    assert result.schedule.trajectory == World().trajectory
    assert result.schedule.is_identity


def test_a_finished_search_neither_walks_nor_samples(tmp_path):
    first, source = searched(tmp_path), MixtureSource(EVEN)
    again = searched(tmp_path, source=source)
    assert source.nfe == 0
    assert outcome(again) == outcome(first) and again.nfe == first.nfe


def test_a_reference_that_comes_later_is_another_walk_and_other_trials(tmp_path):
    alone = searched(tmp_path, source=Quantized(EVEN))
    aware = searched(tmp_path, source=Quantized(EVEN), reference=MixtureSource(EVEN))
    assert aware.journal == alone.journal
    assert aware.best != alone.best
    assert len(aware.trials) == len(alone.trials) == 4
    again = searched(tmp_path, source=(source := Quantized(EVEN)))
    assert outcome(again) == outcome(alone) and source.nfe == 0


def test_a_search_killed_anywhere_goes_on_to_the_same_schedule(tmp_path, repo_root):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system has no SIGKILL")
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(repo_root)!r}, {os.path.dirname(__file__)!r}]
import test_levels as t
class Killed(t.MixtureSource):
    left = int(sys.argv[2])
    def observed(self, *args, **more):
        if self.left == 0:  # in the walk
            os.kill(os.getpid(), signal.SIGKILL)
        return super().observed(*args, **more)
    def images(self, *args, **more):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().images(*args, **more)
t.searched(sys.argv[1], t.SEARCHED, Killed(t.EVEN))
"""
    for pictures in (0, 3, 5):  # in the walk, between proposals, between trials around the best
        command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(pictures)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
    source = MixtureSource(EVEN)
    result = searched(tmp_path / "killed", SEARCHED, source)
    whole = searched(tmp_path / "whole", SEARCHED)
    assert result.new_trials < len(result.trials) - 5
    assert outcome(result) == outcome(whole)
    assert source.nfe < whole.nfe - 12 * 36  # the walk was kept


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strategy": "gp", "grid": 8}, "grid=8 has no meaning for search 'gp'"),
        ({"grid": 1}, "grid=1 must be from 2 to 256"),
        ({"ends": True}, "ends=True has no meaning"),
    ],
)
def test_settings_that_can_not_work_are_refused_by_name(change, says):
    with pytest.raises(CalibrationError, match=says):
        CalibrationSettings(**{"strategy": "levels-dp"} | change)


def test_the_grid_is_part_of_a_studys_name_only_where_there_is_one():
    assert "grid" not in LEVELS.search()
    assert replace(LEVELS, grid=8).search()["grid"] == 8


def test_the_solution_is_that_of_ever_finer_steps():
    """1000 steps of Euler are near enough to the mixture's true path to judge few steps by."""
    model, x = Nearness().model, noise_of(range(4))
    ends = [
        sample_euler(model, x, torch.linspace(1, 0, n + 1, dtype=torch.float64))
        for n in (1000, 4000)
    ]
    assert float((ends[0] - ends[1]).norm(dim=-1).max()) < 0.05
