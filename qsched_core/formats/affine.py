"""Two and three bits a weight: groups of 32, each with a scale and a zero point."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels import GroupedCodes
from .base import CHUNK_ELEMENTS, grouped, least_error, round_to_int
from .grouped import GroupedFormat
from .tables import pack

FP8_MAX = 448.0  # of float8_e4m3fn
HEADROOM = 2.0  # how much the largest scale may grow (a LoRA) before all scales are made anew
STARTS = (1.0, 0.7)  # shares of the group's range to start fitting from
ROUNDS = 4
LEAST_SCALE = 1e-30


class GroupAffine(GroupedFormat):
    """w = scale * (code - zero): scale in fp8 times one fp32 number, zero a byte.

    ``code_bits`` is the size of a code; with the tables of a group of 32 a weight takes half a bit
    more.  Scale and zero are fitted to the group by alternating least squares from two starts (min
    and max, and a tighter clipping), and the codes are chosen against the stored values.
    """

    aux = ("scale", "zero", "scale_2")
    group_size = 32
    code_bits: ClassVar[int]

    @property
    def top(self) -> int:
        """The largest code; a zero point lies in [0, top]."""
        return 2**self.code_bits - 1

    @property
    def zero_steps(self) -> int:
        """Steps of a stored zero point between two codes: every code is one, so that 0 can be exact."""
        return 255 // self.top

    @property
    def grouped_codes(self):
        levels = tuple(float(code) for code in range(self.top + 1))
        return GroupedCodes(self.code_bits, levels, self.zero_steps, LEAST_SCALE)

    def _common(self, weight, like):
        widest = torch.zeros((), device=weight.device)
        for rows in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1])):
            low, high = rows.amin().float().clamp(max=0), rows.amax().float().clamp(min=0)
            widest = torch.maximum(widest, high - low)
        largest = widest.clamp_(min=1e-30) / self.top
        fits = like is not None and largest <= like.aux["scale_2"] * FP8_MAX
        return like.aux["scale_2"] if fits else largest * HEADROOM / FP8_MAX

    def _quantize_rows(self, rows, common, random, old):
        values = grouped(rows, self.group_size)
        scale8, zero8 = self.fit(values, common)
        if old is not None and torch.equal(old["scale_2"], common):
            kept8, kept_zero8 = old["scale"].unsqueeze(2), old["zero"].unsqueeze(2)
            kept, kept_zero = self.stored(kept8, kept_zero8, common)
            span = values / kept + kept_zero
            fits = span.amin(2, keepdim=True) >= -0.5
            fits &= span.amax(2, keepdim=True) <= self.top + 0.5
            scale8 = torch.where(fits, kept8.float(), scale8.float()).to(scale8.dtype)
            zero8 = torch.where(fits, kept_zero8, zero8)
        codes = self.codes(values, *self.stored(scale8, zero8, common), random)
        tables = {"scale": scale8.squeeze(2), "zero": zero8.squeeze(2)}
        return pack(codes.flatten(1), self.code_bits), tables

    def stored(self, scale8, zero8, common) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 scale and zero that stored ones stand for."""
        return (scale8.float() * common).clamp_(min=LEAST_SCALE), zero8.float() / self.zero_steps

    def store(self, scale, zero, common) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero as they are stored."""
        scale8 = (scale / common).clamp_(0, FP8_MAX).to(torch.float8_e4m3fn)
        return scale8, (zero * self.zero_steps).round_().clamp_(0, 255).to(torch.uint8)

    def codes(self, values, scale, zero, random=None) -> torch.Tensor:
        """The codes, as floats, of values under fp32 scales and zeros."""
        return round_to_int(values / scale + zero, random).clamp_(0, self.top)

    def fit(self, values, common) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored scale and zero [rows, groups, 1] of values [rows, groups, size]."""
        low = values.amin(2, keepdim=True).clamp_(max=0)
        high = values.amax(2, keepdim=True).clamp_(min=0)
        mean = values.mean(2, keepdim=True)

        def tries():
            for start in STARTS:
                scale = ((high - low) / self.top * start).clamp_(min=1e-30)
                zero = (self.top / 2 - (high + low) / 2 / scale).clamp_(0, self.top)
                for _ in range(ROUNDS):
                    codes = self.codes(values, scale, zero)
                    mean_code = codes.mean(2, keepdim=True)
                    spread = (codes - mean_code).square().sum(2, keepdim=True)
                    slope = ((codes - mean_code) * values).sum(2, keepdim=True)
                    slope = slope / spread.clamp(min=1e-12)
                    scale = torch.where((spread > 0) & (slope > 0), slope, scale)
                    zero = (mean_code - mean / scale).clamp_(0, self.top)
                scale8, zero8 = self.store(scale, zero, common)
                stored, stored_zero = self.stored(scale8, zero8, common)
                left = self.codes(values, stored, stored_zero) - stored_zero
                left = left.mul_(stored).sub_(values).square_().sum(2, keepdim=True)
                yield left, scale8, zero8

        scale8, zero8 = least_error(tries())
        return scale8, zero8
