"""QSchedule: what it holds, what it refuses, how it is edited and kept in a file."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import RAMPED, SIGMAS, scalar_schedule, schedules

from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import EDITS, QSchedule, ScheduleError


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sigmas": (1.0, 0.9, 0.9, 0.5, 0.0)}, "decrease at every step; sigmas[2]=0.9"),
        ({"sigmas": (1.0, 0.5, 0.0)}, "the correction has 4 steps and the trajectory 2"),
        ({"sigmas": (14.6, 0.9, 0.75, 0.5, 0.0)}, "14.6"),
        ({"sigmas": (1.0, 0.9, 0.75, 0.5, -0.1)}, "-0.1"),
        ({"sigmas": (1.0,)}, "sigmas has 1 values"),
        ({"sigmas": [1 - i / 2000 for i in range(1500)]}, "sigmas has 1500 values"),
        ({"sigmas": "1.0"}, "sigmas='1.0' must be a list"),
        ({"c_x": (1.0, 1.0, 1.0, 7.5)}, "c_x[3]=7.5"),
        ({"c_x": (0.2499, 1.0, 1.0, 1.0)}, "c_x[0]=0.2499"),
        ({"c_eps": (1.0, math.nan, 1.0, 1.0)}, "c_eps[1]=nan"),
        ({"c_eps": (1.0, 1.0, True, 1.0)}, "c_eps[2]=True"),
        ({"c_eps": (1.0, 10**5000, 1.0, 1.0)}, "c_eps[1]=a int must be finite"),
        ({"solver": "heun"}, "heun"),
        ({"solver": ["euler"]}, "solver=['euler']"),
        ({"flow": 1}, "flow=1"),
        ({"provenance": []}, "provenance=[]"),
        ({"provenance": {"x": object()}}, "provenance.x="),
        ({"provenance": {"x": [0, {"y": math.nan}]}}, "provenance.x[1].y=nan"),
        ({"provenance": {"x": 10**5000}}, "provenance.x=a int"),
        ({"provenance": {"x": "\ud800"}}, "surrogate"),
        ({"provenance": {1: "x"}}, "provenance key=1"),
        ({"provenance": {"x": "y" * 2**20}}, "262144 are kept"),
    ],
)
def test_invalid_fields_are_named(change, named):
    ones = (1.0,) * 4
    fields = {"sigmas": SIGMAS, "c_x": ones, "c_eps": ones, "flow": True} | change
    with pytest.raises(ScheduleError) as error:
        scalar_schedule(**fields)
    assert named in str(error.value)
    assert len(str(error.value)) < 400


def test_provenance_that_never_ends_is_refused():
    endless: dict = {}
    endless["again"] = [endless]
    with pytest.raises(ScheduleError, match="nested"):
        QSchedule.identity(RAMPED.trajectory, endless=endless)


def test_provenance_is_a_copy():
    provenance = {"model": {"format": "int2"}}
    schedule = QSchedule.identity(RAMPED.trajectory, **provenance)
    provenance["model"]["format"] = "nf4"
    assert schedule.provenance["model"]["format"] == "int2"


def test_ramp_is_linear_and_meets_both_ends():
    ramp = ScalarCorrection.ramp({"c_x": (0.8, 1.1)}, 4)
    assert ramp.c_x == pytest.approx((0.8, 0.9, 1.0, 1.1))
    assert ramp.c_eps == (1.0,) * 4
    assert ScalarCorrection.ramp({"c_eps": (0.8, 1.1)}, 1).c_eps == (0.8,)
    assert ScalarCorrection.ramp({}, 4) == ScalarCorrection.identity(4)


LEARNED = {
    "source": "calibration",
    "model": {"format": "int2"},
    "scores": {"heldout": [{"jaq": 4.4}, {"jaq": 4.6}]},
    "verdict": "helps",
}


def test_an_edit_changes_one_step_or_all():
    second = RAMPED.edited({"c_x": 1.02, "c_eps": 0.5}, 2, "multiply")
    assert second.correction.c_x == (1.0, 1.1 * 1.02, 1.2, 1.3)
    assert second.correction.c_eps == (0.9, 0.4, 0.7, 0.6)
    every = RAMPED.edited({"c_eps": 0.01})
    assert every.correction.c_eps == pytest.approx((0.91, 0.81, 0.71, 0.61))
    assert every.correction.c_x == RAMPED.correction.c_x
    assert RAMPED.edited({"c_x": 1.0}, 4, "set").correction.c_x == (1.0, 1.1, 1.2, 1.0)
    assert (every.sigmas, every.solver, every.flow) == (SIGMAS, RAMPED.solver, RAMPED.flow)


def test_an_edited_schedule_claims_no_scores_of_its_own():
    learned = QSchedule(RAMPED.trajectory, RAMPED.correction, LEARNED)
    twice = learned.edited({"c_x": 0.01}, 1).edited({"c_x": 1.0, "c_eps": 0.9}, 2, "multiply")
    provenance = twice.provenance
    assert provenance["source"] == "edit"
    assert provenance["model"] == LEARNED["model"]  # it is still meant for that model
    assert not {"scores", "verdict"} & provenance.keys()
    assert [edit["step"] for edit in provenance["edits"]] == [1, 2]
    assert provenance["original"] == {
        "c_x": list(learned.correction.c_x), "c_eps": list(learned.correction.c_eps), "provenance": LEARNED,
    }  # fmt: skip
    assert learned.provenance == LEARNED
    assert QSchedule.from_json(twice.to_json()) == twice


@pytest.mark.parametrize(("mode", "neutral"), [("multiply", 1.0), ("add", 0.0)])
def test_an_edit_that_changes_nothing_is_none(mode, neutral):
    assert RAMPED.edited({"c_x": neutral, "c_eps": neutral}, 0, mode) is RAMPED
    assert RAMPED.edited({"c_x": None}, 3, mode) is RAMPED


def test_a_provenance_that_only_looks_edited_is_kept_as_it_is():
    odd = QSchedule.identity(RAMPED.trajectory, edits=7, original="mine")
    provenance = odd.edited({"c_x": 1.1}, 1).provenance
    assert provenance["original"]["provenance"] == {"edits": 7, "original": "mine"}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"step": 5, "changes": {"c_x": 1.1}}, "step=5 is not in the schedule; choose 1 to 4"),
        ({"step": -1, "changes": {"c_x": 1.1}}, "step=-1"),
        ({"step": 4, "changes": {"c_x": 4.0}, "mode": "multiply"}, "c_x of step 4=5.2"),
        ({"step": 0, "changes": {"c_eps": -0.7}, "mode": "add"}, "c_eps of step 1=0.2"),
        ({"step": 1, "changes": {"c_x": 0.0}, "mode": "set"}, "c_x of step 1=0"),
        ({"step": 1, "changes": {"c_x": math.nan}}, "nan"),
        ({"step": 1, "mode": "scale"}, "mode='scale'"),
    ],
)
def test_an_edit_that_can_not_be_made_is_named(edit, named):
    with pytest.raises(ScheduleError) as error:
        RAMPED.edited(**{"changes": {}} | edit)
    assert named in str(error.value)


@given(schedules(), st.integers(-2, 20), st.floats(-5, 5), st.sampled_from(EDITS))
def test_an_edit_gives_a_valid_schedule_or_a_schedule_error(schedule, step, value, mode):
    try:
        edited = schedule.edited({"c_x": value, "c_eps": None}, step, mode)
    except ScheduleError:
        return
    assert edited.correction.c_eps == schedule.correction.c_eps
    assert QSchedule.from_json(edited.to_json()) == edited


@pytest.mark.parametrize(
    ("denoise", "kept"), [(1.0, 4), (0.9, 4), (0.75, 3), (0.5, 2), (0.6, 2), (0.01, 1)]
)
def test_a_tail_is_the_end_of_the_trajectory(denoise, kept):
    assert RAMPED.tail(denoise) == SIGMAS[4 - kept :]
    assert (
        RAMPED.at(RAMPED.tail(denoise), "strict").correction.c_x
        == RAMPED.correction.c_x[4 - kept :]
    )


@pytest.mark.parametrize("denoise", [0, -1, 1.01, math.nan])
def test_a_tail_of_nothing_is_refused(denoise):
    with pytest.raises(ScheduleError, match="denoise="):
        RAMPED.tail(denoise)


def test_saving_leaves_only_the_file(tmp_path):
    schedule = QSchedule.identity(RAMPED.trajectory)
    schedule.save(tmp_path / "deep" / "a.json")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]
    assert QSchedule.load(tmp_path / "deep" / "a.json") == schedule


def test_saving_over_a_file_is_asked_for(tmp_path):
    path = RAMPED.save(tmp_path / "a.json", overwrite=False)
    with pytest.raises(FileExistsError):
        QSchedule.identity(RAMPED.trajectory).save(path, overwrite=False)
    assert QSchedule.load(path) == RAMPED
    QSchedule.identity(RAMPED.trajectory).save(path)
    assert QSchedule.load(path).is_identity


def test_loading_names_the_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ScheduleError, match=r"broken\.json"):
        QSchedule.load(path)


def test_a_file_from_a_windows_editor_is_read(tmp_path):
    path = tmp_path / "notepad.json"
    path.write_bytes(RAMPED.to_json().replace("\n", "\r\n").encode("utf-8-sig"))
    assert QSchedule.load(path) == RAMPED


def test_a_huge_file_is_refused_without_reading_it_all(tmp_path):
    path = tmp_path / "weights.json"
    with open(path, "wb") as file:
        file.truncate(2**34)
    with pytest.raises(ScheduleError, match="characters"):
        QSchedule.load(path)
