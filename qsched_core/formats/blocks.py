"""Blocks of a row that share a scale, stored as cuBLAS reads them: what nvfp4 and mxfp8 share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..devices import place
from .base import CHUNK_ELEMENTS, Error, Packed, check_finite
from .kitchen import KitchenFormat, backend, kitchen

TILE = (128, 4)  # rows and blocks whose scales cuBLAS keeps together


class BlockFormat(KitchenFormat):
    """A scale for each ``group_size`` weights of a row; ``blocks`` names their table.

    ``_quantize_rows`` gives the scales row by row, ``_values`` takes them so.  Nothing is padded:
    where comfy-kitchen would pad a weight, its product with a bias fails and it dequantizes
    instead, without a word to the user, so such shapes do not fit.
    """

    kinds = ("linear",)
    by_rows = False  # scales are in tiles of 128 rows
    blocks: ClassVar[str] = "scale"
    out_multiple: ClassVar[int]

    def unfit(self, shape):
        reason = super().unfit(shape)
        if reason is None and (shape[1] % 32 or shape[0] % self.out_multiple):
            reason = (
                f"{self.name} needs in features that are a multiple of 32 and out features that "
                f"are a multiple of {self.out_multiple}"
            )
        return reason

    @abstractmethod
    def _values(self, codes, scale, common) -> torch.Tensor:
        """The fp32 values of codes and scales [rows, blocks]."""

    def quantize(self, weight, seed=None, like=None, measure=False):
        self.check(weight, like)
        shape = rows, columns = tuple(weight.shape)
        random = None
        if seed is not None:
            random = torch.Generator(weight.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        common = self._common(weight, like)
        error = Error() if measure else None
        codes = scales = None
        for part, tiles in _parts(rows, columns):
            values = weight[part].float()
            check_finite(values, part.start)
            old = None
            if like is not None:
                kept = like.aux[self.blocks][tiles]
                old = {
                    **like.aux,
                    self.blocks: unswizzle(kept, len(values), columns // self.group_size),
                }
            some, tables = self._quantize_rows(values, common, random, old)
            if error is not None:
                error.add(self._values(some, tables[self.blocks], common), weight[part])
            swizzled = swizzle(tables[self.blocks])
            if codes is None:
                codes = some.new_empty(rows, some.shape[1])
                scales = swizzled.new_empty(_up(rows, TILE[0]), swizzled.shape[1])
            codes[part] = some
            scales[tiles] = swizzled
        tables = {self.blocks: scales} | ({} if common is None else {"scale": common})
        aux = {name: tables[name] for name in self.aux}
        return Packed(codes, aux, shape, self._options(shape), error and error.relative())

    def _dequantize_rows(self, packed, dtype):
        rows, columns = packed.matrix
        out = torch.empty(rows, columns, dtype=dtype, device=packed.codes.device)
        for part, tiles in _parts(rows, columns):
            kept = packed.aux[self.blocks][tiles]
            scale = unswizzle(kept, part.stop - part.start, columns // self.group_size)
            out[part] = self._values(packed.codes[part], scale, packed.aux["scale"])
        return out

    def packed_bytes(self, shape):
        rows, columns = shape
        codes = self.quantize(torch.zeros(self.out_multiple, columns)).codes
        scales = _up(rows, TILE[0]) * _up(columns // self.group_size, TILE[1])
        row = codes.shape[1] * codes.element_size()
        return rows * row + scales + (4 if len(self.aux) > 1 else 0)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] in fp32, rounded as the kernels round a layer's input."""
        x = x.float()
        common = self._common(x, None)
        codes, tables = self._quantize_rows(x, common, None, None)
        return self._values(codes, tables[self.blocks], common)

    def _product(self, tokens, packed, bias):
        if self.serves(tokens):
            # Both kernels want a bias of 16 bits.
            fused = bias if tokens.dtype != torch.float32 else None
            out = self._kernel(tokens, packed, fused)
            bias = None if fused is not None else bias
        else:
            out = F.linear(self.rounded(tokens), self.dequantize(packed))
            out = out.to(tokens.dtype)
        return out if bias is None else out + bias.to(tokens.dtype)

    @abstractmethod
    def _kernel(self, tokens, packed, bias) -> torch.Tensor:
        """tokens [rows, in] times the weight's transpose, plus bias, on a GPU that serves."""

    def backend(self, device):
        at = place(device)
        if self.refusal(at) is not None:
            return f"torch {at}, {self.name} emulated in floats"
        return f"comfy-kitchen {backend(f'scaled_mm_{self.name}', at)} {at}"


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _parts(rows: int, columns: int):
    """Slices of a matrix' rows, some at a time, and of the rows of its swizzled scales."""
    step = max(TILE[0], CHUNK_ELEMENTS // columns // TILE[0] * TILE[0])
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield slice(start, stop), slice(start, _up(stop, TILE[0]))


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Scales [rows, blocks], of one byte each, in cuBLAS' order, filled up to whole tiles."""
    to_blocked = kitchen("the order of block scales").to_blocked
    return to_blocked(scale.view(torch.uint8), False).view(scale.dtype)


def unswizzle(data: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """The scales [rows, blocks] that ``swizzle`` put in order."""
    from_blocked = kitchen("the order of block scales").from_blocked
    return from_blocked(data.view(torch.uint8), rows, blocks).contiguous().view(data.dtype)
