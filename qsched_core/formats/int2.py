"""Two bits a weight, in groups of 32 with a scale and a zero point."""

from __future__ import annotations

from .affine import GroupAffine


class Int2(GroupAffine):
    """Four codes in a byte: 2.5 bits."""

    name = "int2"
    title = "2-bit weights in groups of 32, weights only"
    word = "smallest; only with calibrated weights"
    bits = 2.5
    code_bits = 2
