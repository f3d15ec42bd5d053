"""What bitsandbytes' two 4-bit formats share: blocks of 64, each with its largest magnitude."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import ClassVar

import torch

from ..kernels import GroupedCodes
from ..optional import MissingDependencyError, require
from .base import grouped, largest_magnitude
from .grouped import GroupedFormat
from .tables import nearest_level, pack, stochastic_level

FP8_MAX = 448.0  # of float8_e4m3fn
HEADROOM = 2.0  # how much the largest scale may grow (a LoRA) before all scales are made anew

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _found() -> bool:
    try:
        require("bitsandbytes", "the fast kernels for nf4, fp4 and llm_int8", "bitsandbytes")
    except MissingDependencyError as error:
        logger.warning("bitsandbytes' work is done without it: %s", error)
        return False
    return True


@torch.compiler.assume_constant_result
def has_kernel() -> bool:
    """Whether bitsandbytes' operators are there; the reason is logged, once, if not."""
    return _found()


class BitsAndBytes4(GroupedFormat):
    """Blocks of 64 with their largest magnitude in fp8 times one fp32 number: 4.125 bits.

    Codes are those of bitsandbytes (two a byte, the first in the high half), chosen against the
    *stored* magnitude.  Its kernel unpacks them; without it Triton or torch does, to the same values.
    ``levels`` are the values of the 16 codes, the largest 1.
    """

    bits = 4.125
    aux = ("scale", "scale_2")
    group_size = 64
    levels: ClassVar[tuple[float, ...]]

    @property
    def grouped_codes(self):
        return GroupedCodes(4, self.levels)

    def engine(self, device, dtype):
        return "bitsandbytes" if has_kernel() else super().engine(device, dtype)

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

    def unpack_by(self, engine, packed, dtype):
        if engine != "bitsandbytes":
            return super().unpack_by(engine, packed, dtype)
        (rows, columns), codes = packed.matrix, packed.codes
        largest = packed.aux["scale"].float() * packed.aux["scale_2"]
        kernel, shape = torch.ops.bitsandbytes.dequantize_4bit.default, (rows, codes.shape[1] * 2)
        size = self.group_size
        values = kernel(codes.reshape(-1, 1), largest.reshape(-1), size, self.name, shape, dtype)
        return values[:, :columns]
