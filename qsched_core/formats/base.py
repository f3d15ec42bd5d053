"""What a weight format is: packed storage of a linear layer's weight, and the layer's arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 21  # weights quantized at once: bounds the temporaries to some 50 MB


class FormatError(ValueError):
    """A weight format that can't be used as asked; the message names the value and the fix."""


@dataclass(frozen=True)
class Packed:
    """A quantized weight.

    ``codes`` [out, bytes a row] holds the codes, ``aux`` the tables that give them values (rows
    first, where a table has rows), ``shape`` is the weight's own (out, in).
    """

    codes: torch.Tensor
    aux: Mapping[str, torch.Tensor]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, *self.aux.values()))

    @property
    def bits(self) -> float:
        """Bits a weight as stored, tables and padding counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> Packed:
        aux = {name: t.to(device) for name, t in self.aux.items()}
        return Packed(self.codes.to(device), aux, self.shape)


class WeightFormat(ABC):
    """One way to store a weight [out, in] and to multiply by it.

    ``kind`` says who can open a saved file: "native" plain ComfyUI, "extended" this pack alone.
    ``int8_activations``: the input is rounded to int8 a token at run time, unless the layer is
    asked to run weight-only.  ``aux`` names the tables beside the codes; the first is "scale".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    bits: ClassVar[float]
    kind: ClassVar[Literal["native", "extended"]]
    aux: ClassVar[tuple[str, ...]] = ("scale",)
    group: ClassVar[int] = 1
    int8_activations: ClassVar[bool] = False

    def available(self, device: torch.device | str) -> str | None:
        """Why this format can't run on ``device``, or None."""
        return None

    def backend(self, device: torch.device | str) -> str:
        """What does the arithmetic on ``device``, in words (it goes into a schedule's provenance)."""
        return f"torch {torch.device(device).type}"

    def quantize(
        self, weight: torch.Tensor, seed: int | None = None, like: Packed | None = None
    ) -> Packed:
        """Pack a float weight [out, in], some rows at a time.

        With ``seed`` values round stochastically (unbiased: for baking small LoRAs); with ``like``,
        groups whose new values still fit keep that packing's tables, so that what did not change
        stays bit-identical.  FormatError for anything but a finite 2-D float tensor.
        """
        if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
            raise FormatError(
                f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
                f"{self.name} packs 2-D float weights"
            )
        if like is not None and like.shape != tuple(weight.shape):
            raise FormatError(
                f"weight has shape {tuple(weight.shape)} but was packed as {like.shape}"
            )
        random = None
        if seed is not None:
            random = torch.Generator(weight.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        common = self._common(weight, like)
        step = max(1, CHUNK_ELEMENTS // weight.shape[1])
        codes: torch.Tensor | None = None
        aux: dict[str, torch.Tensor] = {}
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step].float()
            if not torch.isfinite(rows).all():
                raise FormatError(
                    f"the weight has NaN or infinite values in rows {start} to {start + len(rows)}; "
                    "the file is damaged or its half precision overflowed: use a sound copy"
                )
            old = None
            if like is not None:
                old = {k: v[start : start + step] if v.ndim else v for k, v in like.aux.items()}
            part, tables = self._quantize_rows(rows, common, random, old)
            if codes is None:
                shape = (weight.shape[0], part.shape[1])
                codes = torch.empty(shape, dtype=part.dtype, device=part.device)
                aux = {
                    k: torch.empty((weight.shape[0], *v.shape[1:]), dtype=v.dtype, device=v.device)
                    for k, v in tables.items()
                }
            codes[start : start + step] = part
            for name, table in tables.items():
                aux[name][start : start + step] = table
        tables = {**aux, **({} if common is None else {self.aux[-1]: common})}
        return Packed(codes, {k: tables[k] for k in self.aux}, tuple(weight.shape))

    def _common(self, weight: torch.Tensor, like: Packed | None) -> torch.Tensor | None:
        """The one number the whole weight shares (stored as the last table), if there is one."""
        return None

    @abstractmethod
    def _quantize_rows(self, rows, common, random, old) -> tuple[torch.Tensor, dict]:
        """Codes and tables of some rows (fp32)."""

    @abstractmethod
    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the codes stand for."""

    def linear(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None = None,
        weight_only: bool = False,
    ) -> torch.Tensor:
        """x [..., in] times the weight's transpose, plus bias [out]; in x's dtype."""
        weight = self.dequantize(packed, x.dtype)
        if weight_only or not self.int8_activations:
            return F.linear(x, weight, bias)
        codes, scale = quantize_tokens(x)
        out = F.linear(codes.to(x.dtype), weight) * scale.to(x.dtype)
        return out if bias is None else out + bias.to(x.dtype)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x [..., features] and fp32 scales [..., 1]: symmetric, a token at a time.

    The division is in fp32 and the codes are clamped to +-127: in bf16 the largest value of a
    token can round up to 128 and wrap.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def grouped(rows: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, in] as [rows, groups, size], the last group filled up with zeros."""
    rows = F.pad(rows, (0, -rows.shape[1] % size))
    return rows.view(rows.shape[0], -1, size)


def round_to_int(values: torch.Tensor, random: torch.Generator | None) -> torch.Tensor:
    """Nearest integer, or stochastically up or down; what is on an integer (to 1e-3) stays."""
    if random is None:
        return values.round_()
    nearest = values.round()
    noise = torch.rand(values.shape, generator=random, device=values.device)
    return torch.where((values - nearest).abs() < 1e-3, nearest, values.add_(noise).floor_())
