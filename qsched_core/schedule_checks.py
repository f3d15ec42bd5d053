"""What a schedule may hold: the checks of its values, and the error they raise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MIN_COEFFICIENT, MAX_COEFFICIENT = 0.25, 4.0
MAX_STEPS = 1000
MAX_PROVENANCE = 2**20  # characters of JSON; a calibration on 20 prompts writes about 4000
MAX_DEPTH = 64  # far below what any JSON reader or writer recurses to
_INT_LIMIT = 2**64  # seeds are below it; Python refuses to print integers of some thousand digits


class ScheduleError(ValueError):
    """A schedule, or a request to it, that can not be used; the message says how to mend it."""


def shown(value: Any, length: int = 80) -> str:
    """``value`` for an error message: short, on one line and encodable, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nesting
        text = f"a {type(value).__name__}"
    return _short(text, length)


def _short(text: str, length: int = 80) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."


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


def check_coefficient(name: str, value: float) -> None:
    """ScheduleError unless ``value`` is in [0.25, 4]: beyond, no trajectory survives."""
    if not MIN_COEFFICIENT <= value <= MAX_COEFFICIENT:
        raise ScheduleError(
            f"{name}={value:.6g} is outside [{MIN_COEFFICIENT}, {MAX_COEFFICIENT}]; "
            "useful coefficients are near 1"
        )


def check_falling(sigmas: Sequence[float]) -> None:
    """ScheduleError unless there is a step, and sigma falls at every one and not below 0."""
    if not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise ScheduleError(
            f"sigmas has {len(sigmas)} values; give 2 to {MAX_STEPS + 1}, one more than steps"
        )
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        if not after < sigma:  # also where either is NaN
            raise ScheduleError(
                f"sigmas must decrease at every step; sigmas[{i + 1}]={after:.6g} does not "
                f"fall below sigmas[{i}]={sigma:.6g}"
            )
    if sigmas[-1] < 0:
        raise ScheduleError(f"sigmas ends at {sigmas[-1]:.6g}; it may not fall below 0")


def plain_json(name: str, value: Any) -> Any:
    """A copy of ``value`` made of dicts, lists, strings, finite numbers, booleans and None.

    ScheduleError names the place of anything else, and refuses what other readers of the JSON
    could not take: deep nesting, integers beyond 64 bits, unpaired surrogates, over 1 MB of text.
    """
    plain = _plain(name, value, 0)
    size = len(json.dumps(plain))
    if size > MAX_PROVENANCE:
        raise ScheduleError(
            f"{name} is {size} characters of JSON; at most {MAX_PROVENANCE} are kept in a schedule"
        )
    return plain


def _plain(name: str, value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ScheduleError(f"{_short(name)} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {
            _string(f"{name} key", key): _plain(f"{name}.{key}", inner, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", inner, depth + 1) for i, inner in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _string(name, value)
    if isinstance(value, int) and abs(value) < _INT_LIMIT:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ScheduleError(f"{_short(name)}={shown(value)} is not plain JSON")


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ScheduleError(f"{_short(name)}={shown(value)} is not plain JSON; give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ScheduleError(
            f"{_short(name)}={shown(value)} has an unpaired surrogate; it is not Unicode text"
        ) from None
    return str(value)
