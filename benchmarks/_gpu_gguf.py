"""GGUF's quantized weights in torch operations, as packs for ComfyUI run them: from the format's definition.

A block is 32 weights.  Q4_0: an fp16 scale d and 16 bytes, weight j the low half of byte j and weight
j + 16 the high half, w = d * (code - 8).  Q8_0: d and 32 int8 codes, w = d * code.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

BLOCK = 32
BYTES = {"q4_0": 18, "q8_0": 34}


def quantize(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Blocks [count, bytes] (uint8) of a weight whose size is a multiple of 32."""
    blocks = weight.float().reshape(-1, BLOCK)
    if kind == "q8_0":
        scale = blocks.abs().amax(1, keepdim=True) / 127
        codes = (blocks / scale.clamp(min=1e-30)).round().to(torch.int8).view(torch.uint8)
    else:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = largest / -8
        safe = torch.where(scale == 0, 1.0, scale)
        codes = (blocks / safe + 8.5).clamp(0, 15).to(torch.uint8)
        codes = codes[:, :16] | codes[:, 16:] << 4
    return torch.cat([scale.half().view(torch.uint8), codes], 1)


def dequantize(data: torch.Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype):
    """The weight, in ``dtype``, in the steps that GGUF's users run: scale and codes in that dtype."""
    scale, codes = data.split([2, data.shape[1] - 2], 1)
    scale = scale.contiguous().view(torch.float16).to(dtype)
    if kind == "q8_0":
        return (scale * codes.contiguous().view(torch.int8)).reshape(shape)
    shift = torch.tensor([0, 4], dtype=torch.uint8, device=data.device).view(1, 2, 1)
    codes = (codes.unsqueeze(1) >> shift) & 15
    return (scale * (codes.reshape(-1, BLOCK).to(torch.int8) - 8)).reshape(shape)


class GGUFLinear(nn.Module):
    """A linear layer that dequantizes its blocks in each forward."""

    def __init__(self, data: torch.Tensor, kind: str, shape: tuple[int, ...], bias):
        super().__init__()
        self.register_buffer("data", data)
        self.kind, self.shape, self.bias = kind, shape, bias

    def forward(self, x):
        return functional.linear(
            x, dequantize(self.data, self.kind, self.shape, x.dtype), self.bias
        )
