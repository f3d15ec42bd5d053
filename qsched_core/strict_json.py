"""A schedule's JSON: strict reading, and text that a person can read and paste."""

from __future__ import annotations

import json
from typing import Any

from .text import shown
from .validation import ScheduleError, check_parts

MAX_DIGITS = 1000
MAX_TEXT = 2**19  # characters; refused before anything is parsed


def parse(text: Any) -> dict[str, Any]:
    """The object in ``text``; ScheduleError for anything that is not one unambiguous JSON object.

    Stricter than ``json.loads``: no NaN or Infinity, and no key twice.  A leading byte order mark,
    which Windows editors write, is skipped.
    """
    if not isinstance(text, str):
        raise ScheduleError(f"not a schedule: {shown(text)} is not text")
    if len(text) > MAX_TEXT:
        raise ScheduleError(
            f"not a schedule: the text has {len(text)} characters; at most {MAX_TEXT} are read"
        )
    if not text.strip():
        raise ScheduleError("not a schedule: the text is empty; paste a schedule's JSON")
    check_parts("not a schedule: the text", text)
    try:
        content = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_int=_integer,
        )
    except ScheduleError:
        raise
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"not a schedule: the text is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ScheduleError(f"not a schedule: {shown(content)} is not a JSON object")
    return content


def take(content: dict[str, Any], place: str, required: set[str], optional: set[str]) -> None:
    """ScheduleError unless ``content`` has all required fields and no other but the optional."""
    for name in sorted(required - content.keys()):
        raise ScheduleError(f"{name} is missing from {place}")
    for name in content.keys() - required - optional:
        raise ScheduleError(f'{shown(name)} is no field of {place}; notes belong into "provenance"')


def dump(value: Any, indent: int = 0) -> str:
    """JSON with an entry a line, and lists of plain values on one line."""
    pad, end = "  " * (indent + 1), "  " * indent
    if isinstance(value, dict) and value:
        rows = [
            f"{pad}{json.dumps(key)}: {dump(inner, indent + 1)}" for key, inner in value.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{end}}}"
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        rows = [pad + dump(inner, indent + 1) for inner in value]
        return "[\n" + ",\n".join(rows) + f"\n{end}]"
    return json.dumps(value, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ScheduleError(f"not a schedule: {shown(twice)} is given twice in one object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # the time to read a number grows with the square of its digits
        raise ScheduleError(f"not a schedule: {shown(digits)} has {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> None:
    raise ScheduleError(f"not a schedule: {name} is not a number in JSON")
