"""What bitsandbytes' two 4-bit formats share: blocks of 64, each with its largest magnitude."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import ClassVar

import torch

from ..optional import MissingDependencyError, require
from .base import Packed, WeightFormat, grouped, largest_magnitude
from .tables import group_values, nearest_level, pack, stochastic_level

FP8_MAX = 448.0  # of float8_e4m3fn
HEADROOM = 2.0  # how much the largest scale may grow (a LoRA) before all scales are made anew

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _found() -> bool:
    try:
        require("bitsandbytes", "the fast kernels for nf4, fp4 and llm_int8", "bitsandbytes")
    except MissingDependencyError as error:
        logger.warning("plain torch operations do the work of bitsandbytes: %s", error)
        return False
    return True


@torch.compiler.assume_constant_result
def has_kernel() -> bool:
    """Whether bitsandbytes' operators are there; the reason is logged, once, if not."""
    return _found()


class BitsAndBytes4(WeightFormat):
    """Blocks of 64 with their largest magnitude in fp8 times one fp32 number: 4.125 bits.

    Codes are those of bitsandbytes (two a byte, the first in the high half), chosen against the
    *stored* magnitude.  Its kernel unpacks them; without it torch does, to the same values.
    ``levels`` are the values of the 16 codes, the largest 1.
    """

    bits = 4.125
    aux = ("scale", "scale_2")
    group_size = 64
    levels: ClassVar[tuple[float, ...]]

    def backend(self, device):
        library = "bitsandbytes" if has_kernel() else "torch"
        return f"{library} {torch.device(device).type}"

    def _common(self, weight, like):
        largest = largest_magnitude(weight)
        fits = like is not None and largest <= like.aux["scale_2"] * FP8_MAX
        return like.aux["scale_2"] if fits else (largest * HEADROOM / FP8_MAX).clamp_(min=1e-30)

    def _quantize_rows(self, rows, common, random, old):
        blocks = grouped(rows, self.group_size)
        largest = blocks.abs().amax(2)
        scale = (largest / common).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn)
        if old is not None and torch.equal(old["scale_2"], common):
            fits = largest <= old["scale"].float() * common * 1.05
            scale = torch.where(fits, old["scale"].float(), scale.float()).to(scale.dtype)
        stored = (scale.float() * common).clamp_(min=1e-30)
        values = blocks / stored.unsqueeze(2)
        ascending = tuple(sorted(set(self.levels)))
        if random is None:
            codes = nearest_level(values, ascending)
        else:
            codes = stochastic_level(values, torch.tensor(ascending, device=rows.device), random)
        if ascending != self.levels:
            order = torch.tensor([self.levels.index(v) for v in ascending], dtype=torch.uint8)
            codes = order.to(codes.device)[codes.int()]
        return pack(codes.flatten(1), 4), {"scale": scale}

    def _dequantize_rows(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = packed.matrix
        largest = packed.aux["scale"].float() * packed.aux["scale_2"]
        if not has_kernel():
            return group_values(packed.codes, self.levels, 4, largest, None, columns, dtype)
        codes, shape = packed.codes.reshape(-1, 1), (rows, packed.codes.shape[1] * 2)
        unpack = torch.ops.bitsandbytes.dequantize_4bit.default
        return unpack(codes, largest.reshape(-1), self.group_size, self.name, shape, dtype)[
            :, :columns
        ]
