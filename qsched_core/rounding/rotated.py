"""Grids of formats that round weights and inputs in a rotated basis, a scale a row."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..formats.base import Packed
from ..formats.kitchen import INT4_MAX, pack_int4, rotate, rotation_size
from ..formats.w4a4 import int4_tokens
from .grid import Grid


class _RotatedGrid(Grid):
    """Signed integers up to ``top``.

    The rotation is orthonormal and symmetric: a turned weight times turned inputs is the product of
    both as they were.
    """

    top: ClassVar[int]
    starting: ClassVar[tuple[float, ...]]  # shares of "the largest magnitude is the last code"

    def group_size(self, columns):
        return columns

    def turned(self, rows):
        columns = rows.shape[-1]
        return rotate(rows.float().reshape(-1, columns), rotation_size(columns)).view(rows.shape)

    def store(self, scale, zero, common):
        return {"scale": scale.clamp(min=1e-30)}

    def stored(self, tables, common):
        return tables["scale"], torch.zeros_like(tables["scale"])

    def nearest(self, values):
        return values.round().clamp_(-self.top, self.top)

    def starts(self, values):
        scale = values.abs().amax(2).div_(self.top).clamp_(min=1e-30)
        return [(scale * share, torch.zeros_like(scale)) for share in self.starting]


class RotatedInt8Grid(_RotatedGrid):
    """int8_convrot."""

    top = 127
    levels = tuple(float(v) for v in range(-127, 128))
    starting = (1.0,)

    def pack(self, levels, tables, common, columns):
        shape = (len(levels), columns)
        return Packed(levels.to(torch.int8), dict(tables), shape, self.form._options(shape))


class RotatedInt4Grid(_RotatedGrid):
    """w4a4.

    Its layers aim at the unquantized weight: the noise of inputs in 4 bits would pull a target that
    takes up earlier errors towards zero, and along the trajectory that adds up.
    """

    top = INT4_MAX
    levels = tuple(float(v) for v in range(-INT4_MAX, INT4_MAX + 1))
    starting = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    own_target = 0.0
    coarse = True

    def _rounded(self, x):
        codes, scale = int4_tokens(x.reshape(-1, x.shape[-1]))
        return (codes * scale).view(x.shape)

    def pack(self, levels, tables, common, columns):
        shape = (len(levels), columns)
        scale = tables["scale"].view(-1)
        return Packed(pack_int4(levels), {"scale": scale}, shape, self.form._options(shape))
