"""svdquant_w4a4 as a grid: a low-rank branch on the inputs as they are, the rest on rounded ones."""

from __future__ import annotations

import torch

from ..formats.base import Packed
from ..formats.kitchen import INT4_MAX, pack_int4
from ..formats.svdquant_w4a4 import (
    RANK,
    SHIFT,
    SHRINK,
    TABLE_DTYPE,
    UNSIGNED,
    SVDQuantW4A4,
    low_rank,
    with_shift,
)
from .grid import Grid

UINT4_MAX = 15


class SVDQuantGrid(Grid):
    """Signed 4 bits in groups of 64 with a bf16 scale, beside the branch.

    ``unsigned``: the inputs are shifted and rounded to 0 .. 15, which ``suited`` finds out.
    """

    form: SVDQuantW4A4
    levels = tuple(float(v) for v in range(-INT4_MAX, INT4_MAX + 1))
    own_target = 0.0
    coarse = True

    def __init__(
        self,
        form: SVDQuantW4A4,
        weight_only: bool = False,
        unsigned: bool = False,
        branch: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__(form, weight_only)
        self.unsigned, self.branch = unsigned, branch

    def suited(self, x):
        """Unsigned where no input is too small for it and rounding errs less that way."""
        if self.weight_only or float(x.min()) < -SHIFT:
            return self
        other = SVDQuantGrid(self.form, unsigned=True)
        errors = [(grid.seen(x) - x).square().mean() for grid in (self, other)]
        return other if errors[1] < errors[0] else self

    def fitted(self, weight):
        rank = RANK - 1 if self.unsigned else RANK  # the last column is the shift's
        branch = low_rank(weight, rank)
        return SVDQuantGrid(self.form, self.weight_only, self.unsigned, branch)

    @property
    def apart(self):
        up, down = self.branch
        return up.float() @ down.float().t()

    def _rounded(self, x):
        """As comfy-kitchen rounds it, and the shift taken off again."""
        shift, top = (SHIFT, UINT4_MAX) if self.unsigned else (0.0, INT4_MAX)
        groups = (x.to(TABLE_DTYPE) + shift).float().unflatten(-1, (-1, self.form.group_size))
        scale = (groups.abs().amax(-1, keepdim=True) / top).clamp_(min=1e-10)
        codes = (groups / scale).round_().clamp_(0 if self.unsigned else -top, top)
        return codes.mul_(scale.to(TABLE_DTYPE).float()).flatten(-2).sub_(shift)

    def pair(self, x_q, x_fp):
        """The branch sees the inputs as they are, so the codes' share is of those of this model."""
        return (x_q, x_fp) if self.weight_only else (self.seen(x_q), x_q)

    def store(self, scale, zero, common):
        return {"scale": scale.to(TABLE_DTYPE)}

    def stored(self, tables, common):
        scale = tables["scale"].float()
        scale = torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)
        return scale, torch.zeros_like(scale)

    def nearest(self, values):
        return values.round().clamp_(-INT4_MAX, INT4_MAX)

    def starts(self, values):
        scale = values.abs().amax(2).div_(INT4_MAX).clamp_(min=1e-30)
        return [(scale * shrink, torch.zeros_like(scale)) for shrink in SHRINK]

    def pack(self, levels, tables, common, columns):
        up, down = self.branch
        codes, scale = pack_int4(levels), tables["scale"].t().contiguous()
        smooth = torch.ones(columns, dtype=TABLE_DTYPE, device=codes.device)
        aux = {"scale": scale, "proj_down": down, "proj_up": up, "smooth_factor": smooth}
        if self.unsigned:
            aux["proj_up"] = with_shift(codes, aux)
        options = {UNSIGNED: True} if self.unsigned else {}
        return Packed(codes, aux, (len(levels), columns), options)
