"""int8 W8A8 in a rotated basis: outliers are spread over a group before both sides are rounded."""

from __future__ import annotations

import torch

from ..devices import place
from .base import NativeLayout, in_blocks, quantize_tokens, round_to_int
from .int8 import fast_cpu, int8_product
from .kitchen import KitchenFormat, backend, kitchen, rotate, rotation_size


class Int8ConvRot(KitchenFormat):
    """ComfyUI's "int8_tensorwise" with "convrot": a scale a row of the rotated weight.

    Weight and input are multiplied by the same regular Hadamard matrix, block by block (ConvRot,
    arXiv 2512.03673); it is its own inverse, so the product stays what it was.
    """

    name = "int8_convrot"
    title = "8-bit weights and activations (W8A8), rotated against outliers"
    word = "closest"
    bits = 8.0
    native = NativeLayout("int8_tensorwise", "TensorWiseINT8Layout")
    kinds = ("linear",)

    def unfit(self, shape):
        reason = super().unfit(shape)
        if reason is None and rotation_size(shape[1]) is None:
            reason = f"{self.name} needs in features that are a multiple of 4"
        return reason

    def refusal(self, at):
        if at.type != "cuda" or at.at_least(7, 5):
            return None
        return (
            f"{self.name} needs an sm_75 or newer GPU or the CPU; found {at}; what would run "
            "instead is unknown: choose nf4"
        )

    def replaces_host(self, device):
        return place(device).type == "cpu"

    def backend(self, device):
        at = place(device)
        if at.type == "cuda" and self.refusal(at) is None:
            return f"comfy-kitchen {backend('int8_linear', at)} {at}"
        slow = at.type != "cpu" or not fast_cpu()
        return f"torch {at}" + (", integers as floats" if slow else "")

    def _options(self, shape):
        return {"convrot": True, "convrot_groupsize": rotation_size(shape[1])}

    def _quantize_rows(self, rows, common, random, old):
        rows = rotate(rows, rotation_size(rows.shape[1]))
        largest = rows.abs().amax(1, keepdim=True)
        scale = (largest / 127).clamp_(min=1e-30)
        if old is not None:
            scale = scale.where(largest > old["scale"] * 127.5, old["scale"])
        codes = round_to_int(rows / scale, random).clamp_(-127, 127)
        return codes.char(), {"scale": scale}

    def _dequantize_rows(self, packed, dtype):
        size, scale = packed.options["convrot_groupsize"], packed.aux["scale"]

        def some(part: slice) -> torch.Tensor:
            return rotate(packed.codes[part].float().mul_(scale[part]), size)

        return in_blocks(some, packed, packed.shape[1], dtype)

    def _product(self, tokens, packed, bias):
        size = packed.options["convrot_groupsize"]
        if self.serves(tokens):
            scale = packed.aux["scale"]
            multiply = kitchen(self.name).int8_linear
            tokens = tokens.contiguous()
            return multiply(tokens, packed.codes, scale, bias, tokens.dtype, True, size)
        codes, scale = quantize_tokens(rotate(tokens, size))
        return int8_product(codes, scale, packed, bias, tokens.dtype)
