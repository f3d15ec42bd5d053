"""FP4: four bits a weight on the levels of bitsandbytes' 4-bit float."""

from __future__ import annotations

from .bnb4 import BitsAndBytes4

# A sign bit over eight magnitudes, in twelfths of the largest (bitsandbytes, ``get_4bit_type``).
TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class FP4(BitsAndBytes4):
    """The levels of bitsandbytes' "fp4", which order by code neither up nor down."""

    name = "fp4"
    title = "4-bit float, weights only"
    word = "fair"
    levels = tuple(sign * value / 12 for sign in (1, -1) for value in TWELFTHS)
