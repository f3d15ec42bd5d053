"""NF4: four bits a weight on the quantiles of a normal distribution (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from ..optional import MissingDependencyError, require
from .base import Packed, WeightFormat, grouped
from .tables import byte_table, pack, stochastic_level

# The 16 levels of bitsandbytes' "nf4" (QLoRA, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP8_MAX = 448.0  # of float8_e4m3fn
HEADROOM = 2.0  # how much the largest scale may grow (a LoRA) before all scales are made anew

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _bitsandbytes() -> Callable | None:
    """bitsandbytes' operator that unpacks 4-bit codes; None, with the reason logged, without it."""
    try:
        require("bitsandbytes", "the fast nf4 kernel", "bitsandbytes")
    except MissingDependencyError as error:
        logger.warning("nf4 runs on plain torch operations: %s", error)
        return None
    return torch.ops.bitsandbytes.dequantize_4bit.default


class NF4(WeightFormat):
    """Blocks of 64 with their largest magnitude in fp8 times one fp32 number: 4.125 bits.

    Codes are those of bitsandbytes (two a byte, the first in the high half), chosen against the
    *stored* magnitude.  Its kernel unpacks them; without it torch does, to the same values.
    """

    name = "nf4"
    title = "4-bit normal float, weights only"
    bits = 4.125
    kind = "extended"
    aux = ("scale", "scale_2")
    group = 64

    def backend(self, device):
        library = "torch" if _bitsandbytes() is None else "bitsandbytes"
        return f"{library} {torch.device(device).type}"

    def _common(self, weight, like):
        largest = torch.zeros((), device=weight.device)
        for rows in weight.split(4096):
            largest = torch.maximum(largest, rows.abs().amax().float())
        fits = like is not None and largest <= like.aux["scale_2"] * FP8_MAX
        return like.aux["scale_2"] if fits else (largest * HEADROOM / FP8_MAX).clamp_(min=1e-30)

    def _quantize_rows(self, rows, common, random, old):
        blocks = grouped(rows, self.group)
        largest = blocks.abs().amax(2)
        scale = (largest / common).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn)
        if old is not None and torch.equal(old["scale_2"], common):
            fits = largest <= old["scale"].float() * common * 1.05
            scale = torch.where(fits, old["scale"].float(), scale.float()).to(scale.dtype)
        stored = (scale.float() * common).clamp_(min=1e-30)
        values = blocks / stored.unsqueeze(2)
        levels = torch.tensor(LEVELS, device=rows.device)
        if random is None:
            codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        else:
            codes = stochastic_level(values, levels, random)
        return pack(codes.flatten(1), 4), {"scale": scale}

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = packed.shape
        padded = packed.codes.shape[1] * 2
        largest = packed.aux["scale"].float() * packed.aux["scale_2"]
        kernel = _bitsandbytes()
        if kernel is not None:
            codes = packed.codes.reshape(-1, 1)
            shape = (rows, padded)
            values = kernel(codes, largest.reshape(-1), self.group, "nf4", shape, dtype)
        else:
            table = byte_table(LEVELS, 4, packed.codes.device, torch.float32)
            values = torch.nn.functional.embedding(packed.codes.int(), table)
            values = values.view(rows, -1, self.group).mul_(largest.unsqueeze(2))
            values = values.view(rows, padded).to(dtype)
        return values[:, :columns]
