"""What a schedule's file is called where the user leaves it to us."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.files import safe_name
from qsched_core.schedule import QSchedule, ScheduleError
from qsched_core.schedule.naming import AUTOMATIC, file_name, is_automatic, same_subject
from qsched_core.trajectory import Trajectory

TRAJECTORY = Trajectory.of([1.0, 0.75, 0.5, 0.25, 0.0], "euler", True)
MODEL = {"source": "flux/flux1-schnell.safetensors", "format": "nf4", "source_hash": "a"}


def schedule(**model) -> QSchedule:
    return QSchedule.identity(TRAJECTORY, model={**MODEL, **model})


def test_the_parts_are_the_schedules():
    assert file_name(AUTOMATIC, schedule()) == "flux1-schnell-nf4-euler-4"
    assert file_name("mine/{model} at {steps}", schedule()) == "mine/flux1-schnell at 4"
    assert file_name("plain", schedule()) == "plain"


def test_what_it_does_not_say_is_any():
    assert file_name(AUTOMATIC, QSchedule.identity(TRAJECTORY)) == "any-any-euler-4"
    assert file_name(AUTOMATIC) == "any-any-any-any"


@pytest.mark.parametrize("name", ["{seed}", "{", "a}", "{model"])
def test_an_unknown_part_is_named(name):
    assert is_automatic(name)
    with pytest.raises(ScheduleError, match=r"is not known; there are \{model\}"):
        file_name(name, schedule())


def test_a_long_name_is_refused_at_once():
    for name in ("{a" * 500_000, "{" * 500_000, "a" * 500_000):
        with pytest.raises(ScheduleError, match="is too long") as error:
            file_name(name, schedule())
        assert len(str(error.value)) < 400


@given(st.text(max_size=200), st.text(max_size=30))
def test_whatever_the_model_is_called_the_name_is_one_file_in_the_folder(source, form):
    path = safe_name(file_name(AUTOMATIC, schedule(source=source, format=form)))
    assert len(path.parts) == 1


def test_the_subject_is_model_format_and_trajectory():
    other = QSchedule.identity(Trajectory.of([1.0, 0.5, 0.0], "euler", True), model=MODEL)
    assert same_subject(schedule(), schedule(source="renamed.safetensors"))
    assert not same_subject(schedule(), schedule(source_hash="b"))
    assert not same_subject(schedule(), schedule(format="int2"))
    assert not same_subject(schedule(), other)
