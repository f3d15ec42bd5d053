"""The Triton kernel; this file alone imports Triton, and is imported where it can run.

A program unpacks some groups.  A word is the fewest bytes that hold whole codes: one, or three for
3 bits.  fp8 scales are decoded from their bytes, for Triton knows fp8 from sm_89 on alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .codes import GroupedCodes

ELEMENTS = 4096  # of a program: 32 a thread
WARPS = 4
E4M3, FLOAT = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _e4m3(byte):
    """The fp32 value of an fp8 (e4m3fn) byte, without subnormal numbers on the way."""
    exponent = (byte >> 3) & 15
    mantissa = byte & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)  # 2**-9
    value = tl.where((byte & 127) == 127, float("nan"), value)
    return tl.where(byte >= 128, -value, value)


@triton.jit(do_not_specialize=["total", "groups", "columns"])
def unpack_kernel(
    codes, scale, scale_2, zero, out, total, groups, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    FIRST: tl.constexpr, SCALE: tl.constexpr, ZERO_STEPS: tl.constexpr, LEAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK of the ``total`` groups, GROUP values each; a row has ``groups`` of them.

    WHOLE: a row's last group is full, so that ``columns`` is groups * GROUP.
    """
    WORD: tl.constexpr = 3 if BITS == 3 else 1
    COUNT: tl.constexpr = 8 * WORD // BITS
    WORDS: tl.constexpr = GROUP // COUNT
    group = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = group < total

    at = (codes + group * (WORDS * WORD))[:, None] + tl.arange(0, WORDS)[None, :] * WORD
    word = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
    if WORD == 3:
        word = (word << 8) | tl.load(at + 1, mask=inside[:, None], other=0).to(tl.int32)
        word = (word << 8) | tl.load(at + 2, mask=inside[:, None], other=0).to(tl.int32)
    shift = (COUNT - 1 - tl.arange(0, COUNT)) * BITS
    code = (word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    if FIRST is None:
        place = tl.arange(0, 1 << BITS)
        table = tl.zeros([1 << BITS], tl.float32)
        for k in tl.static_range(1 << BITS):
            table = tl.where(place == k, LEVELS[k], table)
        value = tl.gather(table, code.reshape(BLOCK * GROUP), 0).reshape(BLOCK, GROUP)
    else:
        value = (code.reshape(BLOCK, GROUP) + FIRST).to(tl.float32)

    factor = tl.load(scale + group, mask=inside, other=0)
    factor = _e4m3(factor.to(tl.int32)) if SCALE == E4M3 else factor.to(tl.float32)
    factor = factor * tl.load(scale_2).to(tl.float32)
    if LEAST is not None:
        factor = tl.maximum(factor, LEAST, propagate_nan=tl.PropagateNan.ALL)
    value = value * factor[:, None]
    if ZERO_STEPS:
        step = tl.load(zero + group, mask=inside, other=0).to(tl.float32)
        low = -tl.div_rn(step, ZERO_STEPS) * factor
        value = value + low[:, None]

    inner = tl.arange(0, GROUP)
    if WHOLE:
        target, mask = (group * GROUP)[:, None] + inner[None, :], inside[:, None]
    else:
        column = (group % groups * GROUP)[:, None] + inner[None, :]
        target = (group // groups * columns)[:, None] + column
        mask = inside[:, None] & (column < columns)
    tl.store(out + target, value.to(out.dtype.element_ty), mask=mask)


def arguments(
    spec: GroupedCodes,
    codes: torch.Tensor,
    scale: torch.Tensor,
    columns: int,
) -> dict[str, object]:
    """What the kernel is specialized for: the names in capitals."""
    groups = scale.shape[1]
    size = codes.shape[1] * 8 // (spec.bits * groups)
    if size & (size - 1):
        raise ValueError(f"groups of {size} are not a power of two")
    fp8 = scale.dtype == torch.float8_e4m3fn
    first = spec.first_integer
    return {
        "BITS": spec.bits,
        "GROUP": size,
        "BLOCK": ELEMENTS // size,
        "LEVELS": spec.levels if first is None else None,
        "FIRST": first,
        "SCALE": E4M3.value if fp8 else FLOAT.value,
        "ZERO_STEPS": spec.zero_steps,
        "LEAST": spec.least_scale,
        "WHOLE": columns == groups * size,
    }


def launch(
    spec: GroupedCodes,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scale_2: torch.Tensor,
    zero: torch.Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``operator.unpack``."""
    rows, groups = scale.shape
    chosen = arguments(spec, codes, scale, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    data, factors = codes.contiguous(), scale.contiguous()
    if scale.dtype == torch.float8_e4m3fn:
        factors = factors.view(torch.uint8)
    total = rows * groups
    grid = (math.ceil(total / chosen["BLOCK"]),)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        unpack_kernel[grid](
            data.view(torch.uint8),
            factors,
            scale_2,
            data if zero is None else zero.contiguous(),
            out,
            total,
            groups,
            columns,
            **chosen,
            num_warps=WARPS,
            enable_fp_fusion=False,  # as torch's separate operations round
        )
    return out
