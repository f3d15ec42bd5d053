"""The formats' grids."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..formats import get
from ..formats.affine import FP8_MAX, STARTS, GroupAffine
from ..formats.base import Packed
from ..formats.bnb4 import BitsAndBytes4
from ..formats.int8 import Int8
from ..formats.tables import pack
from ..formats.w4a8 import HIGHEST, LOWEST, SHRINK, W4A8
from .errors import RoundingError
from .grid import Grid
from .rotated import RotatedInt4Grid, RotatedInt8Grid
from .svdquant import SVDQuantGrid


class AffineGrid(Grid):
    """int2 and int3: evenly spaced levels with a zero point."""

    form: GroupAffine
    zeros = True

    def __init__(self, form: GroupAffine, weight_only: bool = False):
        super().__init__(form, weight_only)
        self.levels = tuple(float(v) for v in range(form.top + 1))

    def store(self, scale, zero, common):
        scale8, zero8 = self.form.store(scale, zero, common)
        return {"scale": scale8, "zero": zero8}

    def stored(self, tables, common):
        return self.form.stored(tables["scale"], tables["zero"], common)

    def nearest(self, values):
        return values.round().clamp_(0, self.form.top)

    def starts(self, values):
        low, high = values.amin(2).clamp_(max=0), values.amax(2).clamp_(min=0)
        top, made = self.form.top, []
        for start in STARTS:
            scale = ((high - low) / top * start).clamp_(min=1e-30)
            made.append((scale, (top / 2 - (high + low) / 2 / scale).clamp_(0, top)))
        return made

    def pack(self, levels, tables, common, columns):
        codes = pack(levels, self.form.code_bits)
        return Packed(codes, {**tables, "scale_2": common}, (len(levels), columns))


class LookupGrid(Grid):
    """nf4 and fp4: sixteen fixed levels in [-1, 1]."""

    form: BitsAndBytes4

    def __init__(self, form: BitsAndBytes4, weight_only: bool = False):
        super().__init__(form, weight_only)
        self.levels = tuple(sorted(set(form.levels)))
        self._levels = torch.tensor(self.levels)
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2

    def store(self, scale, zero, common):
        return {"scale": (scale / common).clamp(0, FP8_MAX).to(torch.float8_e4m3fn)}

    def stored(self, tables, common):
        scale = (tables["scale"].float() * common).clamp_(min=1e-30)
        return scale, torch.zeros_like(scale)

    def nearest(self, values):
        return self._levels.to(values.device)[self._index(values)]

    def _index(self, values: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(values, self._middles.to(values.device))

    def starts(self, values):
        largest = values.abs().amax(2).clamp_(min=1e-30)
        return [(largest * shrink, torch.zeros_like(largest)) for shrink in SHRINK]

    def pack(self, levels, tables, common, columns):
        order = torch.tensor([self.form.levels.index(v) for v in self.levels], dtype=torch.uint8)
        codes = pack(order.to(levels.device)[self._index(levels)], 4)
        return Packed(codes, {**tables, "scale_2": common}, (len(levels), columns))


class Int4Grid(Grid):
    """w4a8: signed 4 bits with an fp16 scale, which may be negative."""

    form: W4A8
    levels = tuple(float(v) for v in range(LOWEST, HIGHEST + 1))

    def store(self, scale, zero, common):
        return {"scale": (scale / common).to(torch.float16)}

    def stored(self, tables, common):
        scale = tables["scale"].float() * common
        scale = torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)
        return scale, torch.zeros_like(scale)

    def nearest(self, values):
        return values.round().clamp_(LOWEST, HIGHEST)

    def starts(self, values):
        extreme = values.gather(2, values.abs().argmax(2, keepdim=True)).squeeze(2)
        extreme = torch.where(extreme == 0, torch.full_like(extreme, 1e-30), extreme)
        ends = [extreme / end * shrink for end in (LOWEST, HIGHEST) for shrink in SHRINK]
        return [(scale, torch.zeros_like(scale)) for scale in ends]

    def pack(self, levels, tables, common, columns):
        return Packed(
            pack(levels - LOWEST, 4), {**tables, "scale_2": common}, (len(levels), columns)
        )


class RowGrid(Grid):
    """int8: one scale for a whole row."""

    form: Int8
    levels = tuple(float(v) for v in range(-127, 128))

    def group_size(self, columns):
        return columns

    def store(self, scale, zero, common):
        return {"scale": scale.clamp(min=1e-30)}

    def stored(self, tables, common):
        return tables["scale"], torch.zeros_like(tables["scale"])

    def nearest(self, values):
        return values.round().clamp_(-127, 127)

    def starts(self, values):
        scale = values.abs().amax(2).div_(127).clamp_(min=1e-30)
        return [(scale, torch.zeros_like(scale))]

    def pack(self, levels, tables, common, columns):
        return Packed(levels.to(torch.int8), dict(tables), (len(levels), columns))


GRIDS: Mapping[str, type[Grid]] = {
    "int2": AffineGrid,
    "int3": AffineGrid,
    "nf4": LookupGrid,
    "fp4": LookupGrid,
    "w4a8": Int4Grid,
    "int8": RowGrid,
    "int8_convrot": RotatedInt8Grid,
    "w4a4": RotatedInt4Grid,
    "svdquant_w4a4": SVDQuantGrid,
}
_SMALL_FLOATS = "its inputs are rounded in blocks, and no statistics are taken of those yet"
# Why the other formats are rounded plainly.
REASONS: Mapping[str, str] = {
    "w4a8_convrot": "its codebook is made by comfy-kitchen 0.2.28 and newer, which ComfyUI 0.30 has not",
    "llm_int8": "it takes columns out by the inputs of each moment, which the statistics don't know",
    "fp8_e4m3": "its levels have no table that could be fitted",
    "nvfp4": _SMALL_FLOATS,
    "mxfp8": _SMALL_FLOATS,
}


def refusal(name: str) -> str | None:
    """Why weights in format ``name`` can't be calibrated, or None; FormatError for an unknown name."""
    get(name)
    return None if name in GRIDS else REASONS[name]


def grid_of(name: str, weight_only: bool = False) -> Grid:
    """The grid of format ``name``; RoundingError says why there is none, and which there are.

    ``weight_only``: for a layer that keeps its inputs as they are.
    """
    reason = refusal(name)
    if reason is not None:
        raise RoundingError(
            f"format={name!r} can't be calibrated: {reason}; choose one of {', '.join(GRIDS)}"
        )
    return GRIDS[name](get(name), weight_only)


__all__ = ["GRIDS", "REASONS", "grid_of", "refusal"]
