"""Codes of 2, 3 or 4 bits in bytes, the values they stand for, and work in cache-sized blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

CACHE_ELEMENTS = 1 << 18  # fp32 values that a CPU core's cache holds
GPU_ELEMENTS = 1 << 24  # fp32 values unpacked at once on a GPU: 64 MB
# Cells of [-1, 1] in ``nearest_level``: no middle of NF4's or FP4's levels lies near a cell's edge.
CELLS = 990


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, n] below 2**bits as bytes [rows, n * bits / 8], the first in the high bits.

    n is a multiple of 8 for 3 bits, of 8 / bits otherwise.
    """
    codes = codes.to(torch.uint8)
    if bits == 3:  # 8 codes in 3 bytes: 332 132 2 1332, so to say
        a, b, c, d, e, f, g, h = codes.view(codes.shape[0], -1, 8).unbind(2)
        three = (a << 5 | b << 2 | c >> 1, c << 7 | d << 4 | e << 1 | f >> 2, f << 6 | g << 3 | h)
        return torch.stack(three, 2).flatten(1)
    count = 8 // bits
    parts = codes.view(codes.shape[0], -1, count).unbind(2)
    out = parts[0] << (8 - bits)
    for i, part in enumerate(parts[1:], 2):
        out |= part << (8 - bits * i)
    return out


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [rows, n] that ``pack`` put into ``data``, as uint8."""
    index, count = _indexes(data, bits)
    shifts = torch.arange(bits * (count - 1), -1, -bits, dtype=torch.int32, device=data.device)
    codes = (index.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


def _indexes(data: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """Numbers [rows, n / count] of ``count`` codes each: bytes, or halves of 3 bytes."""
    index = data.to(torch.int32)
    if bits != 3:
        return index, 8 // bits
    first, middle, last = index.view(data.shape[0], -1, 3).unbind(2)
    halves = torch.empty((*first.shape, 2), dtype=torch.int32, device=data.device)
    halves[..., 0] = (first << 4) | (middle >> 4)
    halves[..., 1] = ((middle & 15) << 8) | last
    return halves.flatten(1), 4


@lru_cache(maxsize=64)
def _table(levels: Sequence[float], bits: int, count: int, device: torch.device) -> torch.Tensor:
    """[2**(bits * count), count]: the values (fp32) of ``count`` codes in a row."""
    every = torch.arange(2 ** (bits * count)).unsqueeze(1)
    codes = (every >> torch.arange(bits * (count - 1), -1, -bits)) & (2**bits - 1)
    return torch.tensor(levels, dtype=torch.float32)[codes].to(device)


def look_up(data: torch.Tensor, levels: tuple[float, ...], bits: int) -> torch.Tensor:
    """The values [rows, n], fp32, of packed codes, through a table of several codes at once."""
    index, count = _indexes(data, bits)
    table = _table(levels, bits, count, data.device)
    if data.device.type != "cpu":
        return torch.nn.functional.embedding(index, table).flatten(1)
    # On a CPU torch is ten times faster at picking words than at picking rows of a matrix.
    words = table.view({2: torch.int64, 4: torch.complex128}[count]).view(-1)
    return words.index_select(0, index.view(-1)).view(torch.float32).view(data.shape[0], -1)


def _group_values(
    data: torch.Tensor,
    levels: Sequence[float],
    bits: int,
    scale: torch.Tensor,
    low: torch.Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``group_values``, some rows at a time."""
    levels, groups = tuple(levels), scale.shape[1]

    def some(part: slice) -> torch.Tensor:
        values = look_up(data[part].contiguous(), levels, bits).unflatten(1, (groups, -1))
        values.mul_(scale[part].unsqueeze(2))
        return values if low is None else values.add_(low[part].unsqueeze(2))

    out = torch.empty(data.shape[0], columns, dtype=dtype, device=data.device)
    return fill_in_blocks(out, some)


def _group_values_shape(data, levels, bits, scale, low, columns, dtype):
    return data.new_empty((data.shape[0], columns), dtype=dtype)


# Not torch.library.custom_op, which looks for its caller's source in every module that is loaded: in
# ComfyUI that was half of the pack's start-up.
_library = torch.library.Library("qsched", "FRAGMENT")
if not hasattr(torch.ops.qsched, "group_values"):  # this file may be imported under two names
    _library.define(
        "group_values(Tensor data, float[] levels, SymInt bits, Tensor scale, Tensor? low, "
        "SymInt columns, ScalarType dtype) -> Tensor"
    )
    _library.impl("group_values", _group_values, "CompositeExplicitAutograd")
    _library.impl("group_values", _group_values_shape, "Meta")

# group_values(data, levels, bits, scale, low, columns, dtype): the first ``columns`` values
# [rows, columns] of packed codes, scale * level + low.  ``scale`` and ``low`` (None: 0) are
# [rows, groups], fp32, as is the arithmetic.  An operator, so that compilers see one.
group_values = torch.ops.qsched.group_values.default


def block_rows(columns: int, device: torch.device) -> int:
    """How many rows of ``columns`` fp32 values to work on at once: as many as a CPU's cache holds.

    All of them while torch compiles, which makes blocks of its own.
    """
    if torch.compiler.is_compiling():
        return sys.maxsize
    cpu = device.type == "cpu"
    elements = CACHE_ELEMENTS * torch.get_num_threads() if cpu else GPU_ELEMENTS
    return max(1, elements // columns)


def fill_in_blocks(out: torch.Tensor, values: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """``out`` [rows, columns], filled some rows at a time.

    ``values`` gives the fp32 values of some rows, which may have more columns at their end.
    """
    rows, columns = out.shape
    step = block_rows(columns, out.device)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        out[part] = values(part).flatten(1)[:, :columns]
    return out


@lru_cache(maxsize=16)
def _cells(levels: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell of [-1, 1]: the level at its start (uint8), and where the next one begins."""
    levels = torch.tensor(levels)
    middles = (levels[1:] + levels[:-1]) / 2
    first = torch.bucketize(torch.arange(CELLS) * (2 / CELLS) - 1, middles)
    border = torch.cat([middles, torch.tensor([torch.inf])])[first]
    return first.to(device, torch.uint8), border.to(device)


def nearest_level(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Index (uint8) of the nearest of at most 256 ascending levels in [-1, 1].

    ``torch.bucketize`` at the middles between levels, and equal to it, but through a table: no two
    middles may share one of the cells.
    """
    first, border = _cells(levels, values.device)
    cell = (values + 1).mul_(CELLS / 2).clamp_(0, CELLS - 1).to(torch.int32).view(-1)
    above = values.view(-1) > border.index_select(0, cell)
    return first.index_select(0, cell).add_(above).view(values.shape)


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
