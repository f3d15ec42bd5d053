"""fp8 (e4m3) weights and activations, one scale a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..devices import place
from .base import NativeLayout, in_blocks, largest_magnitude, round_to_int
from .kitchen import KitchenFormat, kitchen

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
HALF_STEP = 16.0  # between the largest values


class FP8E4M3(KitchenFormat):
    """ComfyUI's "float8_e4m3fn": the weight's largest magnitude becomes 448.

    The input is cast to fp8 as it is (a scale of 1, as ComfyUI does without a calibrated one).
    """

    name = "fp8_e4m3"
    title = "fp8 (e4m3) weights and activations"
    word = "close"
    bits = 8.0
    native = NativeLayout("float8_e4m3fn", "TensorCoreFP8E4M3Layout")
    kinds = ("linear",)

    def unfit(self, shape):
        reason = super().unfit(shape)
        if reason is None and (shape[0] % 16 or shape[1] % 16):
            reason = f"{self.name} needs in and out features that are multiples of 16"
        return reason

    def refusal(self, at):
        if at.at_least(8, 9):
            return None
        return (
            f"{self.name} needs an sm_89 or newer GPU; found {at}; what would run instead is fp8 "
            "weights, dequantized in each step, with activations as they are: choose int8"
        )

    def backend(self, device):
        at = place(device)
        return f"torch {at}" + (", fp8 emulated in floats" if self.refusal(at) else ", fp8")

    def _common(self, weight, like):
        largest = largest_magnitude(weight)
        if like is not None and largest <= like.aux["scale"] * (FP8_MAX + HALF_STEP):
            return like.aux["scale"]
        return (largest / FP8_MAX).clamp_(min=1e-30)

    def _quantize_rows(self, rows, common, random, old):
        return round_fp8(rows * (1 / common), random), {}

    def _dequantize_rows(self, packed, dtype):
        scale = packed.aux["scale"]
        return in_blocks(
            lambda part: packed.codes[part].float().mul_(scale), packed, packed.shape[1], dtype
        )

    def _product(self, tokens, packed, bias):
        dtype, tokens = tokens.dtype, round_fp8(tokens, None)
        scale = packed.aux["scale"]
        if self.serves(tokens):
            multiply = kitchen(self.name).scaled_mm_v2.scaled_mm_v2
            fused = bias if dtype != torch.float32 else None  # it wants a bias of 16 bits
            one = torch.ones_like(scale)
            out = multiply(tokens, packed.codes.t(), one, scale, fused, dtype)
            bias = None if fused is not None else bias
        else:
            out = F.linear(tokens.float(), packed.codes.float()).mul_(scale).to(dtype)
        return out if bias is None else out + bias.to(dtype)


def round_fp8(values: torch.Tensor, random: torch.Generator | None) -> torch.Tensor:
    """values in fp8 e4m3, saturating, to the nearest or stochastically to one of both around."""
    values = values.clamp(-FP8_MAX, FP8_MAX)
    if random is None:
        return values.to(FP8)
    # A value of m * 2**e, m in [1/2, 1), has the step 2**(e - 4); the smallest normal e is -5.
    exponent = torch.frexp(values).exponent.clamp_(min=-5) - 4
    step = torch.ldexp(torch.ones_like(values), exponent)
    return round_to_int(values / step, random).mul_(step).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
