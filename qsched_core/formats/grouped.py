"""What formats with a scale a group of 32 inputs share: padding, grouping, code packing."""

from __future__ import annotations

import torch

GROUP = 32


def grouped(rows: torch.Tensor) -> torch.Tensor:
    """[n, in] to float32 [n, groups, 32]; the last group is filled with its own last column."""
    padding = -rows.shape[1] % GROUP
    rows = rows.float()
    if padding:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, padding)], 1)
    return rows.unflatten(1, (-1, GROUP))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole codes [n, m] below 2**bits to uint8 [n, m * bits / 8], first code in the low bits."""
    parts = codes.to(torch.uint8).unflatten(1, (-1, 8 // bits))
    out = parts[..., 0].clone()
    for index in range(1, 8 // bits):
        out |= parts[..., index] << (bits * index)
    return out


def unpack_codes(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: uint8 codes [n, m]."""
    mask = (1 << bits) - 1
    parts = [(data >> (bits * index)) & mask for index in range(8 // bits)]
    return torch.stack(parts, -1).flatten(1)
