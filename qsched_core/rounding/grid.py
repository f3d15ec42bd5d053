"""What rounding knows of a format: weight = scale * (level - zero), a scale (and zero) a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..formats.affine import ROUNDS
from ..formats.base import Packed, WeightFormat, quantize_tokens

Tables = dict[str, torch.Tensor]  # as the format stores them, each [rows, groups]


class Grid(ABC):
    """What a format can store, column by column.

    ``levels`` are the values that a code may have.  A table is looked at as an fp32 scale and zero,
    both [rows, groups]; ``common`` is the one number that a weight shares, where the format has it.
    Everything is in the basis in which the format rounds, see :meth:`turned`.

    ``weight_only``: the layer keeps its inputs as they are.  ``own_target`` is how much of the
    earlier layers' error a layer takes up unless it is asked otherwise, from 0 to 1.  ``coarse``:
    inputs are rounded so coarsely that it helps to take their mean off first.
    """

    form: WeightFormat
    levels: tuple[float, ...]
    zeros: ClassVar[bool] = False  # whether a group has a zero point too
    own_target: ClassVar[float] = 1.0
    coarse: ClassVar[bool] = False

    def __init__(self, form: WeightFormat, weight_only: bool = False):
        self.form = form
        self.weight_only = weight_only or not form.low_bit_activations

    @property
    def target(self) -> float:
        return 1.0 if self.weight_only else self.own_target

    @property
    def looks(self) -> bool:
        """Whether a look at some of the inputs serves."""
        return self.coarse and not self.weight_only

    def suited(self, x: torch.Tensor) -> Grid:
        """The grid for a layer whose inputs look like x [rows, in]."""
        return self

    def fitted(self, weight: torch.Tensor) -> Grid:
        """The grid for weight [rows, columns], with what the format multiplies beside the codes."""
        return self

    @property
    def apart(self) -> torch.Tensor | None:
        """What the format multiplies by the unrounded inputs, beside the codes [rows, columns]."""
        return None

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [..., columns] in the basis in which the format rounds them."""
        return rows

    def group_size(self, columns: int) -> int:
        """How many columns share a table."""
        return self.form.group_size

    def common(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.form._common(weight, None)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """A layer's inputs as the codes are multiplied by them: turned, and rounded where they are."""
        return self.turned(x) if self.weight_only else self._rounded(self.turned(x))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] as the format rounds it at run time."""
        codes, scale = quantize_tokens(x)
        return codes * scale

    def pair(self, x_q: torch.Tensor, x_fp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the codes are multiplied by, and what the unquantized weight would be."""
        return self.seen(x_q), self.turned(x_fp)

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


def padded(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, columns] with columns of zeros until they fill whole groups of ``size``."""
    return F.pad(matrix, (0, -matrix.shape[1] % size))
