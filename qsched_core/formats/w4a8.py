"""W4A8: int4 weights in groups of 32, int8 activations a token (the paper's, arXiv 2509.01624)."""

from __future__ import annotations

import torch

from ..kernels import GroupedCodes
from .base import grouped, largest_magnitude, least_error, round_to_int
from .grouped import GroupedFormat
from .tables import pack

LOWEST, HIGHEST = -8, 7
LEVELS = tuple(float(v) for v in range(LOWEST, HIGHEST + 1))
# Multiples of "the largest magnitude lands on the last code" that are tried for each group.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
SCALE_DTYPE = torch.float16


class W4A8(GroupedFormat):
    """Symmetric int4 with an fp16 scale every 32 weights; the scale with the least squared error.

    One fp32 number brings the whole weight into fp16's range.

    The product is that of int8 activations with int4 weights and group scales; the activations are
    exact in every float dtype.
    """

    name = "w4a8"
    title = "4-bit weights in groups of 32, 8-bit activations"
    word = "good"
    bits = 4.5
    group_size = 32
    aux = ("scale", "scale_2")
    low_bit_activations = True
    grouped_codes = GroupedCodes(4, LEVELS)

    def _common(self, weight, like):
        if like is not None:
            return like.aux["scale_2"]
        return largest_magnitude(weight).clamp_(min=1e-30)

    def _quantize_rows(self, rows, common, random, old):
        values = grouped(rows, self.group_size) / common
        largest = values.gather(2, values.abs().argmax(2, keepdim=True))

        def tries():
            for end in (LOWEST, HIGHEST):  # a negative scale puts a positive extreme on -8
                for shrink in SHRINK:
                    scale = _stored(largest / end * shrink)
                    left = _codes(values, scale, None) * scale - values
                    yield left.square_().sum(2, keepdim=True), scale

        (best,) = least_error(tries())
        if old is not None:
            kept = old["scale"].float().unsqueeze(2)
            span = values / _nonzero(kept)
            fits = (span.amin(2, keepdim=True) >= LOWEST - 0.5) & (
                span.amax(2, keepdim=True) <= HIGHEST + 0.5
            )
            best = torch.where(fits, kept, best)
        codes = _codes(values, best, random) - LOWEST
        return pack(codes.flatten(1), 4), {"scale": best.squeeze(2).to(SCALE_DTYPE)}


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(SCALE_DTYPE).float()


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(values, scale, random):
    return round_to_int(values / _nonzero(scale), random).clamp_(LOWEST, HIGHEST)
