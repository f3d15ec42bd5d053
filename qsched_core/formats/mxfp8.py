"""MXFP8: fp8 (e4m3) weights and activations, a power of two as the scale of every 32."""

from __future__ import annotations

import torch

from .base import NativeLayout
from .blocks import BlockFormat
from .fp8 import FP8_MAX, HALF_STEP, round_fp8
from .kitchen import kitchen

BIAS = 127  # of an e8m0 scale: the byte b stands for 2**(b - 127)


class MXFP8(BlockFormat):
    """ComfyUI's "mxfp8" (the OCP microscaling format); the input is rounded in the same way."""

    name = "mxfp8"
    title = "fp8 weights and activations in blocks of 32 (MXFP8)"
    word = "close"
    bits = 8.25
    native = NativeLayout("mxfp8", "TensorCoreMXFP8Layout")
    group_size = 32
    out_multiple = 32

    def refusal(self, at):
        if at.at_least(10, 0):
            return None
        return (
            f"{self.name} needs an sm_100 or newer GPU; found {at}; what would run instead is fp8 "
            "weights, dequantized in each step, with activations as they are: choose int8"
        )

    def _quantize_rows(self, rows, common, random, old):
        values = rows.view(rows.shape[0], -1, self.group_size)
        largest = values.abs().amax(2)
        # The smallest power of two that brings the largest magnitude to 448 or below.
        mantissa, exponent = torch.frexp(largest / FP8_MAX)
        exponent = (exponent - (mantissa == 0.5).int() + BIAS).clamp_(1, 254)
        scale = torch.where(largest == 0, 0, exponent).to(torch.uint8)
        if old is not None:
            kept = old["scale"].view(torch.uint8)
            scale = torch.where(largest <= _power(kept) * (FP8_MAX + HALF_STEP), kept, scale)
        codes = round_fp8(values / _power(scale).unsqueeze(2), random)
        return codes.flatten(1), {"scale": scale.view(torch.float8_e8m0fnu)}

    def _values(self, codes, scale, common):
        power = _power(scale.view(torch.uint8)).unsqueeze(2)
        return codes.float().view(*scale.shape, self.group_size).mul_(power).flatten(1)

    def _kernel(self, tokens, packed, bias):
        ck, rows = kitchen(self.name), len(tokens)
        codes, scale = ck.quantize_mxfp8(tokens.contiguous(), pad_32x=rows % 32 != 0)
        weight, weight_scale = packed.codes, packed.aux["scale"]
        return ck.scaled_mm_mxfp8(codes, weight, scale, weight_scale, bias, tokens.dtype)[:rows]


def _power(scale: torch.Tensor) -> torch.Tensor:
    """2**(scale - 127), fp32; the byte 0 is that of a block of zeros, and gives 1."""
    exponent = torch.where(scale == 0, 0, scale.int() - BIAS)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
