"""The search: finds what is there, survives crashes, and does not fool itself."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import READER, TRAJECTORY, Planted

from qsched_core.calibration import calibrate
from qsched_core.calibration.guard import MIN_PROMPTS, judge
from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.prompts import CalibrationPrompts
from qsched_core.search import STRATEGIES, CalibrationSettings, Monitor
from qsched_core.search.space import RampSpace, StepSpace, grid_points, on_edge
from qsched_core.statistics import Interval, paired_interval
from qsched_core.study import CalibrationError, StudyPlace
from qsched_core.study.journal import Journal
from qsched_core.trajectory import Candidate, Trajectory

optuna = pytest.importorskip("optuna", reason="the search needs optuna")

BEST = ScalarCorrection((1.06, 1.0, 1.03, 0.99), (0.92, 0.97, 1.0, 1.04))
PROMPTS = CalibrationPrompts.of(
    [f"a thing {i}" for i in range(10)], [f"another {i}" for i in range(12)], 3
)
SMALL = {name: 16 if name == "grid" else 30 if "+" in name else 20 for name in STRATEGIES}
SMALL |= {"tpe": 40, "tpe+steps": 60}  # it learns slowest


class World(Planted):
    """A made-up model: JAQ falls with the squared distance from ``best``, a little by prompt."""

    def __init__(self, best=BEST, heldout_best=None, noise=0.0, **more):
        super().__init__(**more)
        self.best, self.heldout_best, self.noise = best, heldout_best or best, noise
        self.calls: list[int] = []

    def __call__(self, candidates, prompts):
        self.calls.append(len(candidates))
        self.nfe += len(prompts) * (3 * len(candidates) + 1)
        best = self.best if prompts == PROMPTS.calibration else self.heldout_best
        return [self.score(candidate.correction, best, prompts) for candidate in candidates]

    def score(self, correction, best, prompts):
        pairs = zip(correction.c_x + correction.c_eps, best.c_x + best.c_eps, strict=True)
        distance = sum((a - b) ** 2 for a, b in pairs)
        jaq = []
        for seed in prompts.seeds:
            chance = random.Random(f"{seed}{correction}").gauss(0, self.noise) if self.noise else 0
            jaq.append(4 + seed % 89 / 89 - (3 + seed % 7 / 7) * distance + chance)
        return Scores(tuple(v - 1 for v in jaq), (0.5,) * len(jaq), tuple(jaq))


class CrashError(Exception):
    pass


class CrashingWorld(World):
    """Fails every call once before it answers."""

    def __call__(self, corrections, prompts):
        self.fail = not getattr(self, "fail", False)
        if self.fail:
            raise CrashError
        return super().__call__(corrections, prompts)


def run(world, folder, settings=None, prompts=PROMPTS, reference=None, **told):
    settings, place = settings or CalibrationSettings("grid", 16), StudyPlace(folder)
    return calibrate(world, READER, prompts, settings, place, reference, Monitor(**told))


def outcome(result):
    return (
        result.schedule.candidate,
        result.best,
        result.verdict,
        [(t.number, t.stage, t.candidate, t.scores) for t in result.trials],
        result.heldout,
    )


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


@pytest.mark.parametrize("name", list(STRATEGIES))
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


# Journal


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_crash_at_every_call_leads_to_the_same_result(name, tmp_path):
    settings = CalibrationSettings(name, SMALL[name], together=3)
    world, crashes, result = CrashingWorld(), 0, None
    while result is None:
        try:
            result = run(world, tmp_path / "crashing", settings)
        except CrashError:
            crashes += 1
    whole = run(reference := World(), tmp_path / "whole", settings)
    assert crashes == len(reference.calls)
    assert sum(world.calls) == sum(reference.calls)  # nothing was done twice
    assert outcome(result) == outcome(whole)


def test_a_journal_cut_anywhere_leads_to_the_same_result(tmp_path):
    settings = CalibrationSettings("gp", 9)
    whole = run(World(), tmp_path, settings)
    data = whole.journal.read_bytes()
    cuts = random.Random(0).sample(range(len(data)), 12)
    for cut in [*cuts, 0, 1, len(data) - 1]:
        whole.journal.write_bytes(data[:cut])
        assert outcome(run(World(), tmp_path, settings)) == outcome(whole)


def test_a_killed_process_leaves_a_study_that_goes_on(tmp_path, repo_root):
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(repo_root)!r}, {os.path.dirname(__file__)!r}]
import test_search as t
class Killed(t.World):
    def __call__(self, corrections, prompts):
        if sum(self.calls) >= 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(corrections, prompts)
t.run(Killed(), sys.argv[1], t.CalibrationSettings("grid", 16, together=1))
"""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system has no SIGKILL")
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    world = World()
    result = run(world, tmp_path)
    assert result.new_trials == len(result.trials) - 5
    assert outcome(result) == outcome(run(World(), tmp_path / "whole"))


def test_a_finished_study_is_not_repeated(tmp_path):
    first = run(World(), tmp_path)
    world = World()
    again = run(world, tmp_path)
    assert world.calls == [] and again.new_trials == 0
    assert again.schedule == first.schedule
    assert again.schedule.provenance == first.schedule.provenance


def test_other_held_out_prompts_repeat_the_judgement_alone(tmp_path):
    run(World(), tmp_path)
    others = CalibrationPrompts(PROMPTS.calibration, PROMPTS.heldout.part(0, 8))
    world = World()
    assert run(world, tmp_path, prompts=others).heldout.n == 8
    assert world.calls == [2]


def test_whatever_changes_the_scores_is_another_study(tmp_path):
    settings = CalibrationSettings("grid", 16)
    fewer = CalibrationPrompts(PROMPTS.calibration.part(0, 9), PROMPTS.heldout)
    for change in (
        {},
        {"world": World(model={"m": 2})},
        {"prompts": fewer},
        {"settings": replace(settings, budget=4)},
        {"settings": replace(settings, seed=1)},
        {"settings": replace(settings, high=1.1)},
    ):
        assert run(**{"world": World(), "folder": tmp_path} | change).new_trials > 0
    for change in ({"guard": False}, {"together": 1}):
        assert run(World(), tmp_path, replace(settings, **change)).new_trials == 0


def test_a_study_that_runs_is_left_alone_and_others_are_free(tmp_path):
    name = run(World(), tmp_path).journal.stem

    def nested(corrections, prompts):
        assert run(World(model={"m": 2}), tmp_path).new_trials
        with pytest.raises(CalibrationError, match="running already"):
            run(World(model={"m": 3}), tmp_path)
        raise CrashError

    with pytest.raises(CrashError):
        run(Planted(nested, {"m": 3}), tmp_path)
    assert run(World(model={"m": 3}), tmp_path).new_trials  # the lock went with its holder
    with Journal(tmp_path, name):
        pass


def test_a_folder_that_can_not_be_written_is_refused_before_the_search(tmp_path):
    (tmp_path / "file").write_text("x")
    world = World()
    with pytest.raises(CalibrationError, match="can't be written"):
        run(world, tmp_path / "file" / "studies")
    assert world.calls == []


def test_a_full_disk_is_refused_before_the_search(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    world = World()
    with pytest.raises(CalibrationError, match=r"\.journal can't be written, .* has 1\.0 MB free"):
        run(world, tmp_path)
    assert world.calls == []


def test_a_disk_that_fills_up_names_the_study_and_keeps_what_is_finished(tmp_path, monkeypatch):
    whole = outcome(run(World(), tmp_path / "whole"))
    backend = optuna.storages.journal.JournalFileBackend
    append, calls = backend.append_logs, []

    def fills_up(self, logs):
        calls.append(logs)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, logs)

    monkeypatch.setattr(backend, "append_logs", fills_up)
    told = r"\.journal .*disk is full: .* free; .*finished trials are kept"
    with pytest.raises(CalibrationError, match=told):
        run(World(), tmp_path / "full")
    monkeypatch.undo()
    again = run(World(), tmp_path / "full")
    assert outcome(again) == whole and 0 < again.new_trials < len(again.trials)


def test_a_damaged_journal_is_named(tmp_path):
    path = run(World(), tmp_path).journal
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{garbage\n", *lines[1:]]))
    with pytest.raises(CalibrationError, match=f"{path.name}.*damaged"):
        run(World(), tmp_path)


# Guard


def test_a_gain_that_does_not_carry_over_is_called_overfitted_and_kept_out(tmp_path):
    world = World(heldout_best=ScalarCorrection.identity(4))
    result = run(world, tmp_path)
    assert result.verdict.kind == "overfitted"
    assert result.schedule.is_identity and result.heldout.high < 0 < result.calibration.low
    unguarded = run(world, tmp_path, CalibrationSettings("grid", 16, guard=False))
    assert unguarded.schedule.candidate == unguarded.best != result.schedule.candidate
    assert unguarded.verdict.kind == "overfitted"


def test_a_model_that_is_best_as_it_is_keeps_1(tmp_path):
    ones = ScalarCorrection.identity(4)
    world = World(ones)
    result = run(world, tmp_path)
    assert result.verdict.kind == "no effect" and result.schedule.is_identity
    assert world.calls[-1] == 1  # there is no other winner to be judged


def test_a_scorer_that_sees_nothing_is_reported(tmp_path):
    def constant(corrections, prompts):
        ones = (1.0,) * len(prompts)
        return [Scores(ones, ones, ones)] * len(corrections)

    result = run(Planted(constant), tmp_path)
    assert result.schedule.is_identity
    assert any("every candidate scored the same" in warning for warning in result.warnings)


def test_an_optimum_outside_the_box_is_reported(tmp_path):
    far = ScalarCorrection((1.9, 1.6, 1.3, 1.0), (1.0,) * 4)
    assert any("edge" in warning for warning in run(World(far), tmp_path).warnings)


def test_pure_noise_rarely_passes_the_guard(tmp_path):
    passed = 0
    for seed in range(60):
        prompts = CalibrationPrompts.of(
            PROMPTS.calibration.prompts, PROMPTS.heldout.prompts, 1000 + seed
        )

        def noise(corrections, members):
            rows = [
                tuple(random.Random(f"{c}{s}").gauss(0, 1) for s in members.seeds)
                for c in corrections
            ]
            return [Scores(row, row, row) for row in rows]

        settings = CalibrationSettings("grid", 4)
        passed += not run(Planted(noise), tmp_path, settings, prompts).schedule.is_identity
    assert passed <= 0.05 * 60


@pytest.mark.parametrize("n", [8, 20, 64])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n):
    draw = random.Random(n)
    hits, rounds = 0, 300
    for _ in range(rounds):
        after = [draw.gauss(0.3, 1) for _ in range(n)]
        interval = paired_interval([0.0] * n, after)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.92 <= hits / rounds <= 0.98


def test_the_interval_pairs_prompts(tmp_path):
    before = [10.0 * i for i in range(12)]
    interval = paired_interval(before, [v + 1 for v in before])
    assert interval.low == pytest.approx(1) and interval.high == pytest.approx(1)


def test_too_few_held_out_prompts_prove_nothing():
    gain = Interval(1.0, 0.5, 1.5, 20)
    assert judge(gain, Interval(1.0, 0.5, 1.5, MIN_PROMPTS), True).kind == "helps"
    few = judge(gain, Interval(1.0, 0.5, 1.5, MIN_PROMPTS - 1), True)
    assert few.keep_identity and str(MIN_PROMPTS) in few.text
