"""The table of weight formats."""

from __future__ import annotations

from ..text import shown
from .base import FormatError, WeightFormat
from .fp4 import FP4
from .fp8 import FP8E4M3
from .int2 import Int2
from .int3 import Int3
from .int8 import Int8
from .int8_convrot import Int8ConvRot
from .llm_int8 import LLMInt8
from .mxfp8 import MXFP8
from .nf4 import NF4
from .nvfp4 import NVFP4
from .svdquant_w4a4 import SVDQuantW4A4
from .w4a4 import W4A4
from .w4a8 import W4A8
from .w4a8_convrot import W4A8ConvRot

FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        NF4(),
        FP4(),
        LLMInt8(),
        Int8(),
        Int8ConvRot(),
        W4A8(),
        W4A8ConvRot(),
        W4A4(),
        SVDQuantW4A4(),
        Int3(),
        Int2(),
        FP8E4M3(),
        NVFP4(),
        MXFP8(),
    )
}


def names() -> tuple[str, ...]:
    return tuple(FORMATS)


def get(name: str) -> WeightFormat:
    """The format called ``name``; FormatError lists those there are."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise FormatError(
            f"weight_format={shown(name)} is unknown; choose one of {', '.join(FORMATS)}"
        ) from None
