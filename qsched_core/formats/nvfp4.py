"""NVFP4: fp4 (e2m1) weights and activations, an fp8 scale every 16, one fp32 scale over all."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from .base import NativeLayout, largest_magnitude
from .blocks import BlockFormat
from .fp8 import FP8, FP8_MAX
from .kitchen import kitchen
from .tables import look_up, stochastic_level

FP4_MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = MAGNITUDES + tuple(-v for v in MAGNITUDES)


def _borders() -> tuple[float, ...]:
    """What a magnitude must exceed for the next code: middles, and ties go to the even code."""
    middles = [(a + b) / 2 for a, b in pairwise(MAGNITUDES)]
    return tuple(m if i % 2 == 0 else math.nextafter(m, 0) for i, m in enumerate(middles))


class NVFP4(BlockFormat):
    """ComfyUI's "nvfp4"; the input is rounded in the same way, with its own scales."""

    name = "nvfp4"
    title = "fp4 weights and activations in blocks of 16 (NVFP4)"
    word = "fair"
    bits = 4.5
    native = NativeLayout(
        "nvfp4", "TensorCoreNVFP4Layout", {"scale": "_scale_2", "block_scale": "_scale"}
    )
    aux = ("scale", "block_scale")
    blocks = "block_scale"
    group_size = 16
    out_multiple = 16

    def refusal(self, at):
        if at.at_least(10, 0):
            return None
        return (
            f"{self.name} needs an sm_100 or newer GPU; found {at}; what would run instead is fp4 "
            "weights, dequantized in each step, with activations as they are: choose nf4"
        )

    def _common(self, weight, like):
        largest = largest_magnitude(weight)
        if like is not None and largest <= like.aux["scale"] * (FP8_MAX * FP4_MAX * 1.01):
            return like.aux["scale"]
        return (largest / (FP8_MAX * FP4_MAX)).clamp_(min=1e-30)

    def _quantize_rows(self, rows, common, random, old):
        values = rows.view(rows.shape[0], -1, self.group_size)
        largest = values.abs().amax(2)
        scale = (largest / FP4_MAX / common).clamp_(max=FP8_MAX).to(FP8)
        if old is not None and torch.equal(old["scale"], common):
            fits = largest <= old["block_scale"].float() * common * (FP4_MAX + 0.5)
            scale = torch.where(fits, old["block_scale"].float(), scale.float()).to(FP8)
        total = common * scale.float()
        total = torch.where(total == 0, torch.inf, total).unsqueeze(2)
        values = (values / total).clamp_(-FP4_MAX, FP4_MAX).flatten(1)
        sign = values.signbit()
        values.abs_()
        if random is None:
            # In fp64, for the borders just below a middle.
            borders = torch.tensor(_borders(), dtype=torch.float64, device=rows.device)
            codes = torch.bucketize(values.double(), borders)
        else:
            codes = stochastic_level(values, torch.tensor(MAGNITUDES, device=rows.device), random)
        codes = codes.to(torch.uint8) | (sign.to(torch.uint8) << 3)
        return codes[:, 0::2] << 4 | codes[:, 1::2], {"block_scale": scale}

    def _values(self, codes, scale, common):
        total = (scale.float() * common).unsqueeze(2)
        values = look_up(codes, LEVELS, 4)
        return values.view(*scale.shape, self.group_size).mul_(total).flatten(1)

    def _kernel(self, tokens, packed, bias):
        ck, rows = kitchen(self.name), len(tokens)
        scale = tokens.abs().amax().float() / (FP8_MAX * FP4_MAX)
        codes, blocks = ck.quantize_nvfp4(tokens.contiguous(), scale, pad_16x=rows % 16 != 0)
        aux = packed.aux
        return ck.scaled_mm_nvfp4(
            codes,
            packed.codes,
            scale,
            aux["scale"],
            blocks,
            aux["block_scale"],
            bias,
            tokens.dtype,
        )[:rows]
