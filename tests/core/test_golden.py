"""Schedules and studies that an earlier version wrote, read by this one: see tests/golden/README.md."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from planted import READER
from search_cases import PROMPTS, World

from qsched_core.calibration import calibrate
from qsched_core.schedule import QSchedule
from qsched_core.search import CalibrationSettings
from qsched_core.study import COMMAND_LINE, StudyPlace
from qsched_core.study.journal import Journal

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text(encoding="utf-8"))
STUDIES = json.loads((GOLDEN / "studies.json").read_text(encoding="utf-8"))


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    path = GOLDEN / "schedules" / f"{request.param}.json"
    return path, QSchedule.load(path), SCHEDULES[request.param]


def test_a_schedule_reads_bit_for_bit(schedule):
    _, found, wanted = schedule
    assert (found.solver, found.flow) == (wanted["solver"], wanted["flow"])
    for name, values in {"sigmas": found.sigmas, **found.correction.rows()}.items():
        assert [value.hex() for value in values] == wanted[name]


def test_a_schedule_serves_the_noise_levels_between_its_own_as_before(schedule):
    _, found, wanted = schedule
    match = found.at(wanted["between"]["sigmas"])
    for name in ("c_x", "c_eps"):
        assert getattr(match.correction, name) == pytest.approx(wanted["between"][name], rel=1e-12)
    assert found.at(found.sigmas).correction == found.correction


def test_a_schedules_provenance_is_kept_and_it_is_written_as_it_was(schedule):
    path, found, _ = schedule
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    assert found.provenance == content.get("provenance", {})
    assert json.loads(found.to_json()) == {"provenance": {}} | content


def test_every_solver_has_a_schedule_and_one_was_edited():
    from qsched_core.solvers import SOLVERS

    found = [QSchedule.load(path) for path in (GOLDEN / "schedules").glob("*.json")]
    assert {path.stem for path in (GOLDEN / "schedules").glob("*.json")} == set(SCHEDULES)
    assert {s.solver for s in found} >= {s for s in SOLVERS if s in WRITTEN}
    assert sum(s.provenance.get("source") == "edit" for s in found) == 2


# the solvers of the version that wrote the files
WRITTEN = {"euler", "euler_ancestral", "lcm", "tcd", "ddim", "dpmpp_2m", "dpmpp_sde"}


def same(value: float):
    """A mean, whose last digit was of how an earlier version summed it."""
    return pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("name", ["comfyui", "sealed"])
def test_a_study_is_read_record_by_record(tmp_path, name):
    wanted = STUDIES[name]
    shutil.copy(GOLDEN / "studies" / wanted["file"], tmp_path)
    with Journal(tmp_path, wanted["name"]) as store:
        for stage, records in wanted["records"].items():
            found = store.records(stage).values()
            assert [[r.slot, dict(r.point), same(r.scores.mean()), r.nfe] for r in found] == records
        for key, value in wanted["notes"].items():
            assert store.get(key) == value


class Place(StudyPlace):
    """The studies were made by a test that said less of itself; all else must be what it was."""

    def open(self, content):
        return super().open(content | {"provenance": {"m": 1}})


def finished(settings, *place):
    world = World()
    result = calibrate(world, READER, PROMPTS, settings, Place(*place))
    assert world.calls == [], "a finished search evaluates nothing"
    return result


def same_result(result, wanted) -> None:
    best = result.best.correction.to_json()
    assert best == wanted["best"] and result.verdict.kind == wanted["verdict"]
    assert [
        [t.stage, *t.candidate.correction.to_json().values(), same(t.value)] for t in result.trials
    ] == wanted["trials"]
    # the interval's ends are of a later statistic; what it is of was kept
    for key in ("mean", "n"):
        assert result.heldout.to_dict()[key] == pytest.approx(wanted["heldout"][key], rel=1e-9)


def test_a_finished_search_is_not_made_again(tmp_path):
    wanted = STUDIES["journal"]
    shutil.copy(GOLDEN / "studies" / wanted["file"], tmp_path)
    settings = CalibrationSettings("gp+steps", 18, seed=1, low=0.9, high=1.1)
    same_result(finished(settings, tmp_path), wanted)


def test_a_finished_shared_search_is_not_made_again(tmp_path):
    database = sqlite3.connect(tmp_path / "study.db")
    database.executescript((GOLDEN / "studies" / "shared.sql").read_text(encoding="utf-8"))
    database.close()
    settings = CalibrationSettings("gp", 8, low=0.9, high=1.1)
    result = finished(
        settings, tmp_path, COMMAND_LINE.database(f"sqlite:///{tmp_path}/study.db"), "golden"
    )
    same_result(result, STUDIES["shared"])
