"""Several workers at one study: no slot twice, nothing lost but a dead worker's own trial."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from statistics import fmean
from types import SimpleNamespace

import pytest
from planted import READER, TRAJECTORY, Planted
from postgres import PASSWORD, postgres, why_not
from search_cases import PROMPTS, World, outcome

from qsched_core.calibration import calibrate
from qsched_core.objective import Scores
from qsched_core.search import CalibrationSettings, Monitor
from qsched_core.search import engine as engine_module
from qsched_core.search.space import RampSpace, grid_points
from qsched_core.study import COMMAND_LINE, CalibrationError, StudyPlace, check_shared
from qsched_core.study.shared import SharedStore, differing
from qsched_core.study.store import Record

pytest.importorskip("sqlalchemy", reason="shared studies need sqlalchemy")
SETTINGS = CalibrationSettings("gp", 12)
POINT = {"c_x start": 0.9, "c_eps start": 1.1}


@pytest.fixture(scope="module")
def postgresql():
    if why_not():
        pytest.skip(why_not())
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    if request.param == "sqlite":
        return COMMAND_LINE.database(f"sqlite:///{tmp_path}/study.db")
    return COMMAND_LINE.database(request.getfixturevalue("postgresql"))


@pytest.fixture
def study(request):
    return f"study of {request.node.name}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(engine_module, "POLL_SECONDS", 0.05)


def work(world, folder, storage=None, study="", settings=SETTINGS):
    place = StudyPlace(folder, storage, study)
    return calibrate(world, READER, PROMPTS, settings, place)


class SlowWorld(World):
    """Takes its time, and says which candidates it saw."""

    def __init__(self, seconds=0.15):
        super().__init__()
        self.seconds, self.seen = seconds, []

    def __call__(self, corrections, prompts):
        time.sleep(self.seconds)
        self.seen += [(prompts.hash, c) for c in corrections]
        return super().__call__(corrections, prompts)


def test_one_worker_finds_what_the_local_journal_finds(storage, study, tmp_path):
    shared = work(World(), tmp_path, storage, study)
    local = work(World(), tmp_path)
    assert outcome(shared) == outcome(local)
    world = World()
    again = work(world, tmp_path, storage, study)
    assert world.calls == [] and again.new_trials == 0 and outcome(again) == outcome(shared)


def test_workers_share_one_search_and_agree(storage, study, tmp_path):
    worlds, results = [SlowWorld() for _ in range(3)], {}

    def run(k):
        results[k] = work(worlds[k], tmp_path / str(k), storage, study)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    first = outcome(results[0])
    assert all(outcome(result) == first for result in results.values())
    assert len(results[0].trials) == 13
    assert sum(result.new_trials for result in results.values()) == 13
    assert sum(result.new_trials > 0 for result in results.values()) >= 2
    # every slot was evaluated once, and what is judged on held-out prompts by one worker alone:
    # the base solver and the winner, which are one where no candidate was better
    judged = {results[0].baseline.candidate, results[0].winner.candidate}
    assert sum(len(world.seen) for world in worlds) == 13 + len(judged)


def test_a_killed_worker_loses_its_own_trial_alone(storage, study, tmp_path, repo_root):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system has no SIGKILL")
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(repo_root), str(repo_root / "tests"), os.path.dirname(__file__)]!r}
import test_search_shared as t
class Killed(t.World):
    def __call__(self, corrections, prompts):
        if len(self.calls) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(corrections, prompts)
settings = t.CalibrationSettings("gp", 12, together=1)
t.work(Killed(), sys.argv[1], t.COMMAND_LINE.database(sys.argv[2]), sys.argv[3], settings)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), storage.url, study],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    os.environ["QSCHED_GRACE_SECONDS"] = "1.5"
    try:
        result = work(World(), tmp_path, storage, study)
    finally:
        del os.environ["QSCHED_GRACE_SECONDS"]
    assert len(result.trials) == 13 and result.new_trials == 10
    local = work(World(), tmp_path)
    assert result.baseline.scores == local.baseline.scores


def test_what_a_failing_worker_had_is_free_at_once(storage, study, tmp_path):
    class Failing(World):
        def __call__(self, corrections, prompts):
            if len(self.calls) == 2:
                raise RuntimeError("no memory")
            return super().__call__(corrections, prompts)

    with pytest.raises(CalibrationError, match=r"trial .* of 13 failed: no memory"):
        work(Failing(), tmp_path, storage, study)
    started = time.monotonic()
    assert len(work(World(), tmp_path, storage, study).trials) == 13
    assert time.monotonic() - started < 20  # less than a silent worker's grace


def test_a_slot_is_taken_once(storage, study):
    space = RampSpace(TRAJECTORY)
    with (
        SharedStore(storage, study, {"a": 1}) as one,
        SharedStore(storage, study, {"a": 1}) as other,
    ):
        with one.claim("ramp", space, {0: POINT, 1: POINT}) as mine:
            assert set(mine.points) == {0, 1}
            assert other.working("ramp") == {0: POINT, 1: POINT}
            with other.claim("ramp", space, {1: POINT, 2: POINT}) as theirs:
                assert set(theirs.points) == {2}
        assert other.working("ramp") == {} and other.records("ramp") == {}
        with other.claim("ramp", space, {1: POINT}) as theirs:
            assert set(theirs.points) == {1}


def test_a_slow_worker_that_beats_keeps_its_slot(storage, study):
    with (
        SharedStore(storage, study, {}, grace=1.0) as one,
        SharedStore(storage, study, {}, grace=1.0) as other,
        one.claim("ramp", RampSpace(TRAJECTORY), {0: POINT}),
    ):
        for _ in range(10):
            time.sleep(0.25)
            assert other.working("ramp") == {0: POINT}


def test_another_study_under_the_same_name_is_refused_before_any_work(storage, study, tmp_path):
    work(World(), tmp_path, storage, study)
    world = World(model={"m": 2})
    with pytest.raises(
        CalibrationError, match=r"begun with something else: provenance\.model\.m: 1, here 2"
    ):
        work(world, tmp_path, storage, study)
    with pytest.raises(CalibrationError, match=r"search\.budget: 12, here 9"):
        work(other := World(), tmp_path, storage, study, CalibrationSettings("gp", 9))
    assert world.calls == other.calls == []


class Others:
    """A store whose trials other workers finish, some at each look; the rest they are at, or free."""

    shared, where = True, "elsewhere"

    def __init__(self, arrivals, busy=()):
        self.arrivals, self.busy, self.done, self.looks = arrivals, dict(busy), {}, 0

    def records(self, stage):
        for record in self.arrivals.get(self.looks, ()):
            self.done[record.slot] = record
            self.busy.pop(record.slot, None)
        self.looks += 1
        return dict(sorted(self.done.items()))

    def working(self, stage):
        return self.busy

    def claim(self, stage, space, points):
        return nullcontext(SimpleNamespace(points=points, finish=self._finish))

    def _finish(self, record):
        self.done[record.slot] = record


def grid_record(slot, prompts, pruned=False):
    """A point of the grid of 4 whose candidates differ from one prompt to another."""
    space = RampSpace(TRAJECTORY, low=0.8, high=1.2)
    points = [space.start, *(p for p in grid_points(space, 2) if p != space.start)]
    jaq = tuple(1 + slot + (0.5 + slot) * i for i in range(prompts))
    return Record(slot, points[slot], Scores(jaq, (0.0,) * prompts, jaq), 0.1, 1, pruned)


def test_given_up_trials_are_measured_against_c_1_whichever_trial_arrives_first():
    whole = len(PROMPTS.calibration)
    pruned = grid_record(2, 3, pruned=True)
    late = [grid_record(0, whole), pruned, grid_record(3, whole), grid_record(4, whole)]
    store = Others({0: [grid_record(1, whole)], 1: late}, dict.fromkeys((0, 2, 3, 4), POINT))
    told = []
    search = engine_module.Search(
        store, World(), READER, CalibrationSettings("grid", 4, pruner="hyperband"),
        PROMPTS.calibration, Monitor(on_trial=lambda progress: told.append(progress.trial)),
    )  # fmt: skip
    search.stages(TRAJECTORY)
    base = grid_record(0, whole).scores.jaq
    value = fmean(base) + fmean(pruned.scores.jaq) - fmean(base[:3])
    assert [trial.number for trial in search.trials if trial.pruned] == [2]
    assert search.trials[2].value == pytest.approx(value)
    assert next(trial.value for trial in told if trial.pruned) == pytest.approx(value)


def test_nothing_is_given_up_before_c_1_is_known():
    whole, world = len(PROMPTS.calibration), World()
    seen = []

    def evaluate(corrections, prompts):
        seen.append((len(store.done), len(prompts)))
        return world(corrections, prompts)

    store = Others({0: [grid_record(1, whole)], 1: [grid_record(0, whole)]}, {0: POINT})
    settings = CalibrationSettings("grid", 4, pruner="hyperband", together=1)
    search = engine_module.Search(store, Planted(evaluate), READER, settings, PROMPTS.calibration)
    search.stages(TRAJECTORY)
    assert seen[0] == (1, whole)  # slot 1 alone is done: every prompt
    assert seen[1][1] < whole  # c = 1 is there: a few first


def test_a_trial_of_thousands_of_prompts_fits_mysqls_columns(tmp_path):
    prompts = 1500
    values = tuple(i / 7 for i in range(prompts))
    scores = Scores(values, values, values, {'odd "name" \\': values, "k\u00e4se": values})
    record = Record(3, POINT, scores, 0.1, 1)
    notes = {"deep": ['"' * 20_000, "\u00e4" * 12_000]}
    file = tmp_path / "study.db"
    database = COMMAND_LINE.database(f"sqlite:///{file}")
    with SharedStore(database, "x", {"a": "b" * 70_000}) as store:
        with store.claim("ramp", RampSpace(TRAJECTORY), {3: POINT}) as claim:
            claim.finish(record)
        store.put("notes", {"other": 1})
        store.put("notes", notes)
    with SharedStore(database, "x", {"a": "b" * 70_000}) as store:
        assert store.records("ramp") == {3: record} and store.get("notes") == notes
    with sqlite3.connect(file) as connection:
        for table in ("trial_user_attributes", "study_user_attributes"):
            query = f"select max(length(cast(value_json as blob))) from {table}"
            assert 0 < connection.execute(query).fetchone()[0] < 2**16
    connection.close()


def test_who_waits_can_be_stopped(storage, study, tmp_path):
    class StoppedError(Exception):
        pass

    def idle():
        raise StoppedError

    space = RampSpace(TRAJECTORY)
    with pytest.raises(StoppedError), SharedStore(storage, study, {}) as store:
        search = engine_module.Search(
            store, World(), READER, CalibrationSettings("grid", 4), PROMPTS.calibration,
            Monitor(idle=idle),
        )  # fmt: skip
        with store.claim("grid", space, dict.fromkeys(range(5), POINT)):
            search.stages(TRAJECTORY)


def test_the_password_is_nowhere(postgresql, study, tmp_path, caplog):
    assert PASSWORD in postgresql
    caplog.set_level("DEBUG")
    result = work(World(), tmp_path, COMMAND_LINE.database(postgresql), study)
    assert result.where == f"study {study!r} in postgresql://127.0.0.1/studies"
    assert PASSWORD not in json.dumps(result.to_dict())
    wrong = postgresql.replace(PASSWORD, "not-the-word")
    with pytest.raises(CalibrationError, match="password was not accepted") as refused:
        work(World(), tmp_path, COMMAND_LINE.database(wrong), study)
    assert "not-the-word" not in str(refused.value)
    assert PASSWORD not in caplog.text and "not-the-word" not in caplog.text


def test_a_database_that_is_not_there_is_said_at_once(tmp_path):
    started, world = time.monotonic(), World()
    database = COMMAND_LINE.database("postgresql://nobody:pw@127.0.0.1:9/none")
    with pytest.raises(CalibrationError, match=r"can't connect to .*/none: .*refused"):
        work(world, tmp_path, database, "x")
    assert time.monotonic() - started < 20 and world.calls == []


@pytest.mark.parametrize(
    ("storage", "study", "says"),
    [
        ("nonsense", "x", "no database URL"),
        ("redis://host", "x", "no database URL"),
        ("env:QSCHED_NOT_SET", "x", "QSCHED_NOT_SET is not set"),
        ("sqlite:///x.db", "  ", "study is empty"),
        ("mysql://user:pw@host/db", "x", "pip install pymysql"),
    ],
)
def test_what_can_not_be_a_shared_study_is_refused(storage, study, says):
    with pytest.raises(CalibrationError, match=says) as refused:
        check_shared(COMMAND_LINE.database(storage), study)
    assert "pw" not in str(refused.value).replace("pip", "")


def test_a_url_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("QSCHED_TEST_URL", "postgresql://a:b@c/d")
    database = COMMAND_LINE.database("env:QSCHED_TEST_URL")
    assert database.url == "postgresql+psycopg://a:b@c/d"


def test_differences_are_named_by_their_path():
    one = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert differing(one, {"a": {"b": 1, "c": [2]}, "e": 3}) == [
        "a.c: [1], here [2]",
        "d: 2, here None",
        "e: None, here 3",
    ]
