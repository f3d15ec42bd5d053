"""int8 W8A8: a scale an output channel, activations rounded to int8 a token at run time."""

from __future__ import annotations

import torch

from .base import Packed, WeightFormat, quantize_tokens, round_to_int


class Int8(WeightFormat):
    """ComfyUI's "int8_tensorwise" with a scale a row: a saved file opens in plain ComfyUI."""

    name = "int8"
    title = "8-bit weights and activations (W8A8)"
    bits = 8.0
    kind = "native"
    int8_activations = True

    def _quantize_rows(self, rows, common, random, old):
        scale = rows.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
        if old is not None:
            fits = rows.abs().amax(1, keepdim=True) <= old["scale"] * 127.5
            scale = torch.where(fits, old["scale"], scale)
        codes = round_to_int(rows / scale, random).clamp_(-127, 127)
        return codes.to(torch.int8), {"scale": scale}

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return packed.codes.to(dtype) * packed.aux["scale"].to(dtype)

    def linear(self, x, packed, bias=None, weight_only=False):
        if weight_only or not _int_mm_serves(x, packed):
            return super().linear(x, packed, bias, weight_only)
        codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
        out = torch._int_mm(codes, packed.codes.t()).float()
        out = out.mul_(scale).mul_(packed.aux["scale"].reshape(1, -1))
        if bias is not None:
            out += bias.float()
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def _int_mm_serves(x: torch.Tensor, packed: Packed) -> bool:
    """Whether torch's int8 product takes these shapes (CUDA wants whole tiles)."""
    rows = x.numel() // x.shape[-1]
    if x.device.type == "cuda":
        return rows > 16 and packed.shape[0] % 8 == 0 and packed.shape[1] % 8 == 0
    return x.device.type == "cpu" and rows > 0
