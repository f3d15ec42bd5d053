"""A study: it survives crashes, has one worker, and is not repeated."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from planted import Planted
from search_cases import PROMPTS, SMALL, CrashError, CrashingWorld, World, outcome, run

from qsched_core.prompts import CalibrationPrompts
from qsched_core.search import STRATEGIES, CalibrationSettings
from qsched_core.study import CalibrationError
from qsched_core.study.journal import Journal

optuna = pytest.importorskip("optuna", reason="the search needs optuna")


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
import search_cases as t
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


def test_the_base_that_was_lost_is_made_again_before_candidates_that_were_given_up(tmp_path):
    settings = CalibrationSettings("grid", 16, pruner="hyperband", together=1)
    whole = run(World(), tmp_path, settings)
    assert any(trial.pruned for trial in whole.trials)
    (path,) = tmp_path.glob("*.journal")
    lines = path.read_text().splitlines(keepends=True)
    first = [i for i, line in enumerate(lines) if line.startswith('{"op_code":4,')]
    kept = {i for i, trial in zip(first, whole.trials, strict=False) if trial.pruned}
    lost = set(first[: len(whole.trials)]) - kept
    path.write_text("".join(line for i, line in enumerate(lines) if i not in lost))
    again = run(World(), tmp_path, settings)
    assert outcome(again)[:3] == outcome(whole)[:3]
    assert again.baseline.candidate.is_identity and again.new_trials == len(lost)
