"""Two bits a weight, in groups of 32 with a scale and a zero point."""

from __future__ import annotations

import torch

from .base import Packed, WeightFormat, grouped, round_to_int
from .tables import byte_table, pack

TOP = 3  # the largest code
LEVELS = tuple(float(v) for v in range(TOP + 1))
FP8_MAX = 448.0  # of float8_e4m3fn
HEADROOM = 2.0  # how much the largest scale may grow (a LoRA) before all scales are made anew
ZERO_STEPS = 85.0  # a zero point in [0, 3] is stored as a byte: 255 / 85 = 3
STARTS = (1.0, 0.7)  # shares of the group's range to start fitting from
ROUNDS = 4


class Int2(WeightFormat):
    """w = scale * (code - zero): scale in fp8 times one fp32 number, zero a byte: 2.5 bits.

    Scale and zero are fitted to the group by alternating least squares from two starts (min
    and max, and a tighter clipping), and the codes are chosen against the stored values.
    """

    name = "int2"
    title = "2-bit weights in groups of 32, weights only"
    bits = 2.5
    kind = "extended"
    aux = ("scale", "zero", "scale_2")
    group = 32

    def _common(self, weight, like):
        widest = torch.zeros((), device=weight.device)
        for rows in weight.split(4096):
            widest = torch.maximum(
                widest, (rows.amax().clamp(min=0) - rows.amin().clamp(max=0)).float()
            )
        largest = widest.clamp_(min=1e-30) / TOP
        fits = like is not None and largest <= like.aux["scale_2"] * FP8_MAX
        return like.aux["scale_2"] if fits else largest * HEADROOM / FP8_MAX

    def _quantize_rows(self, rows, common, random, old):
        values = grouped(rows, self.group)
        scale8, zero8 = _fit(values, common)
        if old is not None and torch.equal(old["scale_2"], common):
            kept8, kept_zero8 = old["scale"].unsqueeze(2), old["zero"].unsqueeze(2)
            kept, kept_zero = _stored(kept8, kept_zero8, common)
            span = values / kept + kept_zero
            fits = (span.amin(2, keepdim=True) >= -0.5) & (span.amax(2, keepdim=True) <= TOP + 0.5)
            scale8 = torch.where(fits, kept8.float(), scale8.float()).to(scale8.dtype)
            zero8 = torch.where(fits, kept_zero8, zero8)
        scale, zero = _stored(scale8, zero8, common)
        codes = _codes(values, scale, zero, random)
        return pack(codes.flatten(1), 2), {"scale": scale8.squeeze(2), "zero": zero8.squeeze(2)}

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = packed.shape
        aux = packed.aux
        scale, zero = _stored(aux["scale"], aux["zero"], aux["scale_2"])
        low = (-zero * scale).to(dtype).unsqueeze(2)
        table = byte_table(LEVELS, 2, packed.codes.device, dtype)
        values = torch.nn.functional.embedding(packed.codes.int(), table)
        values = values.view(rows, -1, self.group)
        values = torch.addcmul(low, values, scale.to(dtype).unsqueeze(2))
        return values.view(rows, -1)[:, :columns]


def _stored(scale8, zero8, common) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 scale and zero that stored ones stand for."""
    return (scale8.float() * common).clamp_(min=1e-30), zero8.float() / ZERO_STEPS


def _store(scale, zero, common) -> tuple[torch.Tensor, torch.Tensor]:
    scale8 = (scale / common).clamp_(0, FP8_MAX).to(torch.float8_e4m3fn)
    return scale8, (zero * ZERO_STEPS).round_().clamp_(0, 255).to(torch.uint8)


def _codes(values, scale, zero, random=None) -> torch.Tensor:
    return round_to_int(values / scale + zero, random).clamp_(0, TOP)


def _fit(values: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored scale and zero [rows, groups, 1] of values [rows, groups, size]."""
    low, high = (
        values.amin(2, keepdim=True).clamp_(max=0),
        values.amax(2, keepdim=True).clamp_(min=0),
    )
    best8 = best_zero8 = error = None
    for start in STARTS:
        scale = ((high - low) / TOP * start).clamp_(min=1e-30)
        zero = (TOP / 2 - (high + low) / 2 / scale).clamp_(0, TOP)
        for _ in range(ROUNDS):
            codes = _codes(values, scale, zero)
            mean_code = codes.mean(2, keepdim=True)
            mean = values.mean(2, keepdim=True)
            spread = (codes - mean_code).square().sum(2, keepdim=True)
            slope = ((codes - mean_code) * values).sum(2, keepdim=True) / spread.clamp(min=1e-12)
            scale = torch.where((spread > 0) & (slope > 0), slope, scale)
            zero = (mean_code - mean / scale).clamp_(0, TOP)
        scale8, zero8 = _store(scale, zero, common)
        stored, stored_zero = _stored(scale8, zero8, common)
        left = (_codes(values, stored, stored_zero) - stored_zero).mul_(stored).sub_(values)
        left = left.square_().sum(2, keepdim=True)
        if error is None:
            best8, best_zero8, error = scale8, zero8, left
        else:
            better = left < error
            best8 = torch.where(better, scale8.float(), best8.float()).to(scale8.dtype)
            best_zero8 = torch.where(better, zero8, best_zero8)
            error = torch.where(better, left, error)
    return best8, best_zero8
