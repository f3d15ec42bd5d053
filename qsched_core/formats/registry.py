"""The table of weight formats."""

from __future__ import annotations

from .base import FormatError, WeightFormat
from .int2 import Int2
from .int8 import Int8
from .nf4 import NF4
from .w4a8 import W4A8

FORMATS: dict[str, WeightFormat] = {f.name: f for f in (NF4(), Int8(), W4A8(), Int2())}


def names() -> tuple[str, ...]:
    return tuple(FORMATS)


def get(name: str) -> WeightFormat:
    """The format called ``name``; FormatError lists those there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(
            f"weight_format={name!r} is unknown; choose one of {', '.join(FORMATS)}"
        ) from None
