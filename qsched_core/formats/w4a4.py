"""W4A4 in a rotated basis: ComfyUI's "convrot_w4a4"."""

from __future__ import annotations

import dataclasses

import torch

from ..devices import FORCE_INT8, place
from .base import NativeLayout, in_blocks, round_to_int
from .int8 import int8_product
from .kitchen import (
    INT4_MAX,
    KitchenFormat,
    backend,
    kitchen,
    pack_int4,
    rotate,
    rotation_size,
    unpack_int4,
)

GROUP = 64  # of in features: what comfy-kitchen's int4 kernel reads at once


class W4A4(KitchenFormat):
    """int4 codes and a scale for each row of the rotated weight and each token of the rotated input.

    The weight's quantizer is comfy-kitchen's: largest magnitude on code 7.  On a CPU the int4 codes
    are multiplied as int8, which is exact.  On NVIDIA GPUs comfy-kitchen multiplies int4 by int4 on
    sm_80 to sm_89 alone; elsewhere it keeps the input in int8.
    """

    name = "w4a4"
    title = "4-bit weights and activations (W4A4), rotated against outliers"
    word = "rough"
    bits = 4.0
    native = NativeLayout("convrot_w4a4", "TensorCoreConvRotW4A4Layout")
    kinds = ("linear",)

    def unfit(self, shape):
        return super().unfit(shape) or self.unfit_columns(shape[1], GROUP)

    def refusal(self, at):
        native = at.at_least(8, 0) and not at.at_least(9, 0)
        if at.type == "cpu" or (native and not at.forced_int8):
            return None
        found, instead = str(at), "int4 weights with int8 activations"
        if native:
            found += f" with {FORCE_INT8}=1"
        elif at.capability == (7, 5):
            instead = "int4 or int8 activations, by the number of rows"
        elif not at.at_least(7, 5):
            instead = "unknown"
        return (
            f"{self.name} needs an sm_80 to sm_89 GPU or the CPU; found {found}; what would run "
            f"instead is {instead}: choose w4a8"
        )

    def replaces_host(self, device):
        return place(device).type == "cpu"

    def backend(self, device):
        at = place(device)
        if at.type != "cuda" or self.refusal(at) is not None:
            return f"torch {at}, int4 activations emulated in int8"
        name = backend("convrot_w4a4_linear", at)
        return f"comfy-kitchen {name} {at}, int4" + (
            "" if name == "cuda" else " activations emulated in floats"
        )

    def _options(self, shape):
        return {"convrot_groupsize": rotation_size(shape[1])}

    def _quantize_rows(self, rows, common, random, old):
        rows = rotate(rows, rotation_size(rows.shape[1]))
        largest = rows.abs().amax(1)
        scale = (largest / INT4_MAX).clamp_(min=1e-30)
        if old is not None:
            scale = scale.where(largest > old["scale"] * (INT4_MAX + 0.5), old["scale"])
        codes = round_to_int(rows / scale.unsqueeze(1), random).clamp_(-INT4_MAX, INT4_MAX)
        return pack_int4(codes), {"scale": scale}

    def _dequantize_rows(self, packed, dtype):
        size, scale = packed.options["convrot_groupsize"], packed.aux["scale"].unsqueeze(1)

        def some(part: slice) -> torch.Tensor:
            return rotate(unpack_int4(packed.codes[part]).float().mul_(scale[part]), size)

        return in_blocks(some, packed, packed.shape[1], dtype)

    def _product(self, tokens, packed, bias):
        size = packed.options["convrot_groupsize"]
        if self.serves(tokens):
            multiply = kitchen(self.name).convrot_w4a4_linear
            return multiply(tokens, packed.codes, packed.aux["scale"], bias, size)
        codes, scale = int4_tokens(rotate(tokens, size))
        weight_scale = packed.aux["scale"].unsqueeze(1)
        weight = dataclasses.replace(
            packed, codes=unpack_int4(packed.codes), aux={"scale": weight_scale}
        )
        return int8_product(codes, scale, weight, bias, tokens.dtype)


def int4_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int4 codes (int8) of x [rows, features] and fp32 scales [rows, 1], a token at a time."""
    scale = (x.abs().amax(1, keepdim=True).float() / INT4_MAX).clamp_(min=1e-30)
    return (x / scale).round_().to(torch.int8), scale
