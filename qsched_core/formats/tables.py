"""Codes of 2 or 4 bits in bytes, and back through a table of all 256 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, n] below 2**bits as bytes [rows, n * bits / 8], the first in the high bits."""
    count = 8 // bits
    codes = codes.view(codes.shape[0], -1, count).to(torch.uint8)
    out = torch.zeros(codes.shape[:2], dtype=torch.uint8, device=codes.device)
    for i in range(count):
        out |= codes[..., i] << (bits * (count - 1 - i))
    return out


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [rows, n] that ``pack`` put into ``data``, as uint8."""
    count = 8 // bits
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=data.device)
    codes = (data.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.view(data.shape[0], data.shape[1] * count)


@lru_cache(maxsize=64)
def byte_table(
    levels: Sequence[float], bits: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """[256, 8 / bits]: the values of the codes in each byte."""
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    values = torch.tensor(levels, dtype=torch.float32)[unpack(every, bits).long()]
    return values.to(device=device, dtype=dtype)


def stochastic_level(
    values: torch.Tensor, levels: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Index of one of the two levels around each value, so that the mean is the value.

    What is on a level (to 1e-3 of the gap) stays there.
    """
    values = values.clamp(levels[0], levels[-1])
    low = (torch.searchsorted(levels, values, right=True) - 1).clamp_(0, len(levels) - 2)
    gap = (values - levels[low]) / (levels[low + 1] - levels[low])
    gap = torch.where(gap < 1e-3, 0.0, torch.where(gap > 1 - 1e-3, 1.0, gap))
    return low + (torch.rand(values.shape, generator=random, device=values.device) < gap)
