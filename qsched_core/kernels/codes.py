"""How codes in groups stand for values: what a kernel has to know of a weight format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupedCodes:
    """A weight is level[code] * s - (zero / zero_steps) * s, with s = scale * scale_2 of its group.

    Codes of ``bits`` lie in a row of bytes, the first in the high bits; ``levels`` are their values.
    ``scale`` [rows, groups] is fp8 (e4m3) or fp16, ``scale_2`` one fp32 number; s is at least
    ``least_scale``, if there is one.  ``zero`` [rows, groups] is a byte; formats without it have
    ``zero_steps`` 0.  All arithmetic is in fp32, and nothing in it is fused.
    """

    bits: int
    levels: tuple[float, ...]
    zero_steps: int = 0
    least_scale: float | None = None

    def __post_init__(self):
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits={self.bits} must be 2, 3 or 4")
        if len(self.levels) != 2**self.bits:
            raise ValueError(
                f"levels has {len(self.levels)} values; {self.bits} bits need {2**self.bits}"
            )

    @property
    def first_integer(self) -> int | None:
        """The level of code 0 where levels are integers in a row, so that code + this is the level."""
        first = self.levels[0]
        whole = all(level == first + code for code, level in enumerate(self.levels))
        return int(first) if whole and first == int(first) else None
