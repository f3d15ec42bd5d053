"""Three bits a weight, in groups of 32 with a scale and a zero point."""

from __future__ import annotations

from .affine import GroupAffine


class Int3(GroupAffine):
    """Eight codes in three bytes: 3.5 bits."""

    name = "int3"
    title = "3-bit weights in groups of 32, weights only"
    word = "small; with calibrated weights like 4 bits"
    bits = 3.5
    code_bits = 3
