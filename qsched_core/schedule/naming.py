"""What a schedule's file is called where the user leaves it to us."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from ..files import MOST_NAME
from ..text import plain, shown
from ..validation import ScheduleError
from .schedule import QSchedule

AUTOMATIC = "{model}-{format}-{solver}-{steps}"
MOST = 80  # characters of the model's name


def is_automatic(name: str) -> bool:
    """Whether ``name`` has parts that come from the schedule."""
    return "{" in name or "}" in name


def filled(name: str, parts: Mapping[str, str]) -> str:
    """``name`` with each of ``parts`` in the place of its name in braces.

    ValueError for a part that there is not, and for a name that is longer than any file's.
    """
    if len(name) > MOST_NAME:
        raise ValueError(f"name={shown(name)} is too long; give at most {MOST_NAME} characters")
    made = re.sub(r"{(\w+)}", lambda part: parts.get(part[1], part[0]), name)
    if is_automatic(made):
        known = ", ".join(f"{{{part}}}" for part in parts)
        raise ValueError(f"name={shown(name)} has a part that is not known; there are {known}")
    return made


def model_parts(source: str, weight_format: str) -> dict[str, str]:
    """The parts {model} and {format}; ``source`` is the model's file, "" if it is not known."""
    stem = PurePosixPath(source.replace("\\", "/")).stem
    return {"model": _usable(stem)[:MOST], "format": _usable(weight_format)}


def file_name(name: str, schedule: QSchedule | None = None) -> str:
    """``name`` with its parts filled in: {model}, {format}, {solver} and {steps}.

    What a schedule does not say of itself is "any"; without a schedule every part is.  ScheduleError
    for a part that there is not, and for a name that is longer than any file's.
    """
    parts = dict.fromkeys(re.findall(r"{(\w+)}", AUTOMATIC), "any")
    if schedule is not None:
        model = schedule.provenance.get("model")
        model = model if isinstance(model, dict) else {}
        parts |= model_parts(str(model.get("source") or ""), str(model.get("format") or ""))
        parts |= {"solver": schedule.solver, "steps": str(schedule.steps)}
    try:
        return filled(name, parts)
    except ValueError as error:
        raise ScheduleError(str(error)) from None


def _usable(text: str) -> str:
    """``text`` as a part of a file's name on any system."""
    return re.sub(r"[^\w.+()-]+", "-", plain(text)).strip("-. ") or "any"


def same_subject(one: QSchedule, other: QSchedule) -> bool:
    """Whether both were learned for the same model, format and trajectory."""
    return one.trajectory == other.trajectory and _subject(one) == _subject(other)


def _subject(schedule: QSchedule) -> tuple:
    model = schedule.provenance.get("model")
    model = model if isinstance(model, dict) else {}
    return tuple(model.get(key) for key in ("source_hash", "format", "patches", "merged_patches"))
