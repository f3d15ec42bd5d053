"""Checks of what comes from a file or a workflow, and the error that names what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import plainly_named
from .text import plain, shown

MAX_STEPS = 1000
MAX_PROVENANCE = 2**18  # characters of JSON; a calibration on 20 prompts writes about 4000
# Brackets and commas of JSON: every list, object and entry takes time to read.  A schedule of 1000
# steps that was calibrated, and edited a hundred times, has some 12 000.
MAX_PARTS = 2**14
MAX_DEPTH = 64  # far below the recursion limit of any JSON reader or writer
_INT_LIMIT = 2**64  # seeds are below it; Python refuses to print integers of some thousand digits


@plainly_named
class ScheduleError(ValueError):
    """A schedule, or a request to it, that can not be used; the message says how to mend it."""


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """``values`` as finite floats; ScheduleError names ``name`` and the position."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise ScheduleError(f"{name}={shown(values)} must be a list of numbers")
    if len(values) > MAX_STEPS + 1:
        raise ScheduleError(
            f"{name} has {len(values)} values; at most {MAX_STEPS} steps can be used"
        )
    return tuple(_number(f"{name}[{i}]", value) for i, value in enumerate(values))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScheduleError(f"{name}={shown(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ScheduleError(f"{name}={shown(value)} must be finite")
    return number


def plain_json(name: str, value: Any) -> Any:
    """A copy of ``value`` made of dicts, lists, strings, finite numbers, booleans and None.

    ScheduleError names the place of anything else, and refuses what other readers of the JSON
    could not take: deep nesting, integers beyond 64 bits, unpaired surrogates, and text that is too
    long or has too many parts.
    """
    try:
        found = _plain(value, 0)
    except _NotPlainError as error:
        place = "".join(reversed(error.path))
        raise ScheduleError(f"{plain(name + place, 80)}{error.said}") from None
    text = json.dumps(found)
    if len(text) > MAX_PROVENANCE:
        raise ScheduleError(
            f"{name} is {len(text)} characters of JSON; at most {MAX_PROVENANCE} are kept in a "
            "schedule"
        )
    check_parts(name, text, MAX_PARTS - 4 * MAX_STEPS)
    return found


def check_parts(name: str, text: str, most: int = MAX_PARTS) -> None:
    """ScheduleError for JSON of more lists, objects and entries than any schedule has."""
    parts = sum(map(text.count, "[{,"))
    if parts > most:
        raise ScheduleError(
            f"{name} has {parts} brackets and commas; at most {most} are read from a schedule"
        )


class _NotPlainError(Exception):
    """What is wrong, and where.

    The path is collected innermost first while the exception rises: sound JSON costs nothing for it."""

    def __init__(self, said: str, *path: str):
        self.said, self.path = said, list(path)


def _plain(value: Any, depth: int) -> Any:
    if type(value) is float and math.isfinite(value):  # the most common case, tested first
        return value
    if value is None or isinstance(value, bool):
        return value
    if depth > MAX_DEPTH:
        raise _NotPlainError(f" is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int) and abs(value) < _INT_LIMIT:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, depth)
    if isinstance(value, list | tuple):
        return _plain_list(value, depth)
    raise _NotPlainError(f"={shown(value)} is not plain JSON")


def _plain_mapping(value: Mapping, depth: int) -> dict[str, Any]:
    found = {}
    for key, inner in value.items():
        if not isinstance(key, str):
            raise _NotPlainError(f"={shown(key)} is not plain JSON; give a string", " key")
        name = _string(key, " key")
        try:
            found[name] = _plain(inner, depth + 1)
        except _NotPlainError as error:
            error.path.append(f".{name[:80]}")
            raise
    return found


def _plain_list(value: Sequence, depth: int) -> list:
    found: list = []
    for inner in value:
        try:
            found.append(_plain(inner, depth + 1))
        except _NotPlainError as error:
            error.path.append(f"[{len(found)}]")
            raise
    return found


def _string(value: str, *path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _NotPlainError(
            f"={shown(value)} has an unpaired surrogate; it is not Unicode text", *path
        ) from None
    return str(value)
