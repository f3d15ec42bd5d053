"""Formats as grids: weight = scale * (level - zero), with a scale (and zero) for each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..formats import get
from ..formats.affine import FP8_MAX, ROUNDS, STARTS, GroupAffine
from ..formats.base import Packed, WeightFormat, grouped, quantize_tokens
from ..formats.bnb4 import BitsAndBytes4
from ..formats.int8 import Int8
from ..formats.tables import pack
from ..formats.w4a8 import HIGHEST, LOWEST, SHRINK, W4A8
from .errors import RoundingError

Tables = dict[str, torch.Tensor]  # as the format stores them, each [rows, groups]


class Grid(ABC):
    """What a format can store, column by column.

    ``levels`` are the values that a code may have.  A table is looked at as an fp32 scale and zero,
    both [rows, groups]; ``common`` is the one number that a weight shares, where the format has it.
    """

    form: WeightFormat
    levels: tuple[float, ...]
    zeros: ClassVar[bool] = False  # whether a group has a zero point too

    def __init__(self, form: WeightFormat):
        self.form = form

    def group_size(self, columns: int) -> int:
        """How many columns share a table."""
        return self.form.group_size

    def common(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.form._common(weight, None)

    def seen(self, x: torch.Tensor, weight_only: bool) -> torch.Tensor:
        """A layer's inputs as its arithmetic sees them: rounded, where the format rounds them."""
        if weight_only or not self.form.low_bit_activations:
            return x
        codes, scale = quantize_tokens(x)
        return codes * scale

    @abstractmethod
    def store(self, scale: torch.Tensor, zero: torch.Tensor, common) -> Tables:
        """Tables that hold scales and zeros as nearly as the format can."""

    @abstractmethod
    def stored(self, tables: Tables, common) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 scales and zeros that tables stand for."""

    @abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The level nearest to each of ``values`` (in units of the scale, zero added)."""

    @abstractmethod
    def starts(self, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and zeros [rows, groups] to start a fit of values [rows, groups, size] from."""

    @abstractmethod
    def pack(self, levels: torch.Tensor, tables: Tables, common, columns: int) -> Packed:
        """The format's own packing of levels [rows, padded columns]."""

    def fit(self, values: torch.Tensor, weights: torch.Tensor, common) -> Tables:
        """Tables of least squared error of values [rows, groups, size].

        A value's error counts ``weights`` [groups, size] times.  Alternating least squares from each
        start; the best of all tables that were stored on the way wins, plain rounding's among them.
        """
        share = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
        mean = (values * share).sum(2)
        best: Tables = {}
        least = None
        for scale, zero in self.starts(values):
            for round_ in range(ROUNDS + 1):
                if round_ in (0, ROUNDS):
                    tables = self.store(scale, zero, common)
                    error = self._error(values, share, tables, common)
                    if least is None:
                        best, least = tables, error
                    else:
                        better = error < least
                        best = {k: _where(better, tables[k], best[k]) for k in best}
                        least = torch.where(better, error, least)
                if round_ < ROUNDS:
                    scale, zero = self._step(values, share, mean, scale, zero)
        return best

    def _error(self, values, share, tables: Tables, common) -> torch.Tensor:
        scale, zero = (t.unsqueeze(2) for t in self.stored(tables, common))
        found = (self.nearest(values / scale + zero) - zero).mul_(scale)
        return found.sub_(values).square_().mul_(share).sum(2)

    def _step(self, values, share, mean, scale, zero):
        """Scale and zero by least squares for the levels that are nearest now."""
        levels = self.nearest(values / scale.unsqueeze(2) + zero.unsqueeze(2))
        mean_level = (levels * share).sum(2) if self.zeros else torch.zeros_like(scale)
        centred = levels - mean_level.unsqueeze(2)
        spread = (centred.square() * share).sum(2)
        slope = (centred * share * values).sum(2) / spread.clamp(min=1e-12)
        scale = torch.where((spread > 0) & (slope * scale > 0), slope, scale)
        if self.zeros:
            zero = (mean_level - mean / scale).clamp_(self.levels[0], self.levels[-1])
        return scale, zero


def _where(condition, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """torch.where for dtypes that it does not know (fp8)."""
    return torch.where(condition, one.float(), other.float()).to(one.dtype)


class AffineGrid(Grid):
    """int2 and int3: evenly spaced levels with a zero point."""

    form: GroupAffine
    zeros = True

    def __init__(self, form: GroupAffine):
        super().__init__(form)
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

    def __init__(self, form: BitsAndBytes4):
        super().__init__(form)
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
}
_ROTATED = "it rounds weights and inputs in a rotated basis, where no statistics are taken yet"
_SMALL_FLOATS = "its inputs are rounded in blocks, and no statistics are taken of those yet"
# Why the other formats are rounded plainly.
REASONS: Mapping[str, str] = {
    "int8_convrot": _ROTATED,
    "w4a4": _ROTATED,
    "w4a8_convrot": _ROTATED,
    "svdquant_w4a4": "its low-rank branch is not taken into account yet",
    "llm_int8": "it takes columns out by the inputs of each moment, which the statistics don't know",
    "fp8_e4m3": "its levels have no table that could be fitted",
    "nvfp4": _SMALL_FLOATS,
    "mxfp8": _SMALL_FLOATS,
}


def refusal(name: str) -> str | None:
    """Why weights in format ``name`` can't be calibrated, or None; FormatError for an unknown name."""
    get(name)
    return None if name in GRIDS else REASONS[name]


def grid_of(name: str) -> Grid:
    """The grid of format ``name``; RoundingError says why there is none, and which there are."""
    reason = refusal(name)
    if reason is not None:
        raise RoundingError(
            f"format={name!r} can't be calibrated: {reason}; choose one of {', '.join(GRIDS)}"
        )
    return GRIDS[name](get(name))


def padded(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, columns] with columns of zeros until they fill whole groups of ``size``."""
    return F.pad(matrix, (0, -matrix.shape[1] % size))


__all__ = ["GRIDS", "REASONS", "Grid", "Tables", "grid_of", "grouped", "padded", "refusal"]
