"""What a weight format is: packed storage of a layer's weight, and the layer's arithmetic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from ..errors import plainly_named
from .tables import block_rows, fill_in_blocks

CHUNK_ELEMENTS = 1 << 21  # weights quantized at once: bounds the temporaries to some 50 MB
PRODUCT_ELEMENTS = 1 << 20  # weights that a CPU dequantizes at once to multiply by them


@plainly_named
class FormatError(ValueError):
    """A weight format that can't be used as asked; the message names the value and the fix."""


@dataclass(frozen=True)
class Packed:
    """A quantized weight.

    ``codes`` [out, bytes a row] holds the codes, ``aux`` the tables that give them values (rows
    first, where a table has rows), ``shape`` is the weight's own: (out, in) of a linear layer,
    (out, in, height, width) of a convolution, whose rows are its filters.  ``options`` are plain
    values that the arithmetic needs besides; ``error`` is |dequantized - weight| / |weight| where
    it was measured.
    """

    codes: torch.Tensor
    aux: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    options: Mapping[str, int | str | bool] = field(default_factory=dict)
    error: float | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the weight as the matrix that is packed."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, *self.aux.values()))

    @property
    def bits(self) -> float:
        """Bits a weight as stored, tables and padding counted."""
        return 8 * self.nbytes / math.prod(self.shape)

    def rows(self, part: slice) -> Packed:
        """Some rows of a packing all of whose tables but the single numbers have rows."""
        codes, aux = self.codes[part], {n: t[part] if t.ndim else t for n, t in self.aux.items()}
        return Packed(codes, aux, (len(codes), *self.shape[1:]), self.options)

    def to(self, device: torch.device | str) -> Packed:
        aux = {name: t.to(device) for name, t in self.aux.items()}
        return Packed(self.codes.to(device), aux, self.shape, self.options, self.error)


@dataclass(frozen=True)
class NativeLayout:
    """How ComfyUI itself stores a native format.

    ``algorithm`` is its name in a file's "comfy_quant" entry, ``layout`` comfy-kitchen's class, and
    ``keys`` the ending after ".weight" of each of our tables in the file.
    """

    algorithm: str
    layout: str
    keys: Mapping[str, str] = field(default_factory=lambda: {"scale": "_scale"})


class WeightFormat(ABC):
    """One way to store a weight and to multiply by it.

    ``native`` is None for an "extended" format, whose files this pack alone can open; for a "native"
    one it says how plain ComfyUI stores it.  ``kinds`` are the layers it is for; a convolution
    always runs on its dequantized weight.  ``low_bit_activations``: a linear layer's input is
    rounded too at run time, unless the layer is asked to run weight-only.  ``aux`` names the tables
    beside the codes; the first is "scale".  ``word`` tells a user how near its layers stay to the
    unquantized ones.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    word: ClassVar[str]
    bits: ClassVar[float]
    native: ClassVar[NativeLayout | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv2d")
    aux: ClassVar[tuple[str, ...]] = ("scale",)
    group_size: ClassVar[int] = 1
    by_rows: ClassVar[bool] = True  # whether rows of a packing are a packing: see Packed.rows
    low_bit_activations: ClassVar[bool] = False

    @property
    def file_kind(self) -> Literal["native", "extended"]:
        return "extended" if self.native is None else "native"

    def available(self, device: torch.device | str) -> str | None:
        """Why this format can't run on ``device`` (and what would run instead), or None."""
        return None

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of ``shape`` can't be packed in this format, or None."""
        kind = {2: "linear", 4: "conv2d"}.get(len(shape))
        return None if kind in self.kinds else f"{self.name} is for {' and '.join(self.kinds)}"

    def wrong_options(self, options: Mapping[str, int | str | bool]) -> str | None:
        """What is wrong with a stored packing's options, or None."""
        return None

    def backend(self, device: torch.device | str) -> str:
        """What does the arithmetic on ``device``, in words (it goes into a schedule's provenance)."""
        return f"torch {torch.device(device).type}"

    def replaces_host(self, device: torch.device | str) -> bool:
        """Whether our arithmetic runs on ``device`` instead of the host's, to the same result."""
        return self.native is None

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of ``shape`` takes, tables and padding counted."""
        rows, columns = shape[0], math.prod(shape[1:])
        one, two = (self.quantize(torch.zeros(n, columns)).nbytes for n in (64, 128))
        return one + (two - one) * (rows - 64) // 64

    def quantize(
        self,
        weight: torch.Tensor,
        seed: int | None = None,
        like: Packed | None = None,
        measure: bool = False,
    ) -> Packed:
        """Pack a float weight, some rows at a time, on the device it is on.

        With ``seed`` values round stochastically (unbiased: for baking small LoRAs); with ``like``,
        groups whose new values still fit keep that packing's tables, so that what did not change
        stays bit-identical; with ``measure`` the packing says its relative error.  FormatError for
        anything but a finite float tensor of a shape that fits.
        """
        self.check(weight, like)
        shape = tuple(weight.shape)
        weight = weight.reshape(shape[0], -1)
        random = None
        if seed is not None:
            random = torch.Generator(weight.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        common = self._common(weight, like)
        step = max(1, CHUNK_ELEMENTS // weight.shape[1])
        step = min(step, block_rows(weight.shape[1], weight.device))
        codes: torch.Tensor | None = None
        aux: dict[str, torch.Tensor] = {}
        options = self._options(shape)
        error = Error() if measure else None
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step].float()
            check_finite(rows, start)
            old = None
            if like is not None:
                old = {k: v[start : start + step] if v.ndim else v for k, v in like.aux.items()}
            part, tables = self._quantize_rows(rows, common, random, old)
            if error is not None:
                whole = {**tables, **({} if common is None else {self.aux[-1]: common})}
                packed = Packed(part, {k: whole[k] for k in self.aux}, tuple(rows.shape), options)
                error.add(self.dequantize(packed), weight[start : start + step])
            if codes is None:
                codes = torch.empty(
                    (weight.shape[0], *part.shape[1:]), dtype=part.dtype, device=part.device
                )
                aux = {
                    k: torch.empty((weight.shape[0], *v.shape[1:]), dtype=v.dtype, device=v.device)
                    for k, v in tables.items()
                }
            codes[start : start + step] = part
            for name, table in tables.items():
                aux[name][start : start + step] = table
        tables = {**aux, **({} if common is None else {self.aux[-1]: common})}
        return Packed(
            codes, {k: tables[k] for k in self.aux}, shape, options, error and error.relative()
        )

    def check(self, weight: torch.Tensor, like: Packed | None = None) -> None:
        """FormatError unless ``weight`` is a float tensor of a shape that fits."""
        shape = tuple(weight.shape)
        if not weight.is_floating_point() or weight.numel() == 0:
            raise FormatError(
                f"weight has shape {shape} and dtype {weight.dtype}; {self.name} packs float weights"
            )
        reason = self.unfit(shape)
        if reason is not None:
            raise FormatError(f"weight has shape {shape}; {reason}")
        if like is not None and like.shape != shape:
            raise FormatError(f"weight has shape {shape} but was packed as {like.shape}")

    def _options(self, shape: tuple[int, ...]) -> dict[str, int | str | bool]:
        """Plain values that go with a packing of a weight of ``shape``."""
        return {}

    def _common(self, weight: torch.Tensor, like: Packed | None) -> torch.Tensor | None:
        """The one number the whole weight shares (stored as the last table), if there is one."""
        return None

    @abstractmethod
    def _quantize_rows(self, rows, common, random, old) -> tuple[torch.Tensor, dict]:
        """Codes and tables of some rows (fp32)."""

    @abstractmethod
    def _dequantize_rows(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, columns] that the codes stand for."""

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for, in its own shape."""
        return self._dequantize_rows(packed, dtype).reshape(packed.shape)

    def linear(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None = None,
        weight_only: bool = False,
    ) -> torch.Tensor:
        """x [..., in] times the weight's transpose, plus bias [out]; in x's dtype."""
        if weight_only or not self.low_bit_activations:
            return self._on_values(x, packed, bias)
        codes, scale = quantize_tokens(x)
        values, rest = scaled_codes(codes, scale, x.dtype)
        out = self._on_values(values, packed) * rest
        return out if bias is None else out + bias.to(x.dtype)

    def _on_values(self, x, packed: Packed, bias=None) -> torch.Tensor:
        """x [..., in] times the dequantized weight's transpose, plus bias.

        A CPU dequantizes some rows at a time: a large new matrix costs it more in page faults than
        in arithmetic.
        """
        rows, columns = packed.matrix
        step = max(1, PRODUCT_ELEMENTS // columns)
        plain = x.device.type != "cpu" or step >= rows or not self.by_rows
        if plain or torch.compiler.is_compiling() or x.requires_grad:
            return F.linear(x, self.dequantize(packed, x.dtype), bias)
        tokens = x.reshape(-1, columns)
        out = x.new_empty(len(tokens), rows)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weight = self.dequantize(packed.rows(part), x.dtype).t()
            if bias is None:
                torch.mm(tokens, weight, out=out[:, part])
            else:
                torch.addmm(bias[part], tokens, weight, out=out[:, part])
        return out.view(*x.shape[:-1], rows)


class Error:
    """Sums up the squared error of chunks of a weight."""

    def __init__(self):
        self.error = self.energy = 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        wanted = wanted.float()
        self.error = self.error + (found - wanted).square_().sum(dtype=torch.float64)
        self.energy = self.energy + wanted.square().sum(dtype=torch.float64)

    def relative(self) -> float:
        """|found - wanted| / |wanted|; 0 for a weight of zeros."""
        energy = float(self.energy)
        return math.sqrt(float(self.error) / energy) if energy else 0.0


def check_finite(rows: torch.Tensor, start: int = 0) -> None:
    """FormatError if some of the rows (the first of them is number ``start``) are not finite."""
    if not (torch.isfinite(rows.amax()) and torch.isfinite(rows.amin())):
        raise FormatError(
            f"the weight has NaN or infinite values in rows {start} to {start + len(rows)}; "
            "the file is damaged or its half precision overflowed: use a sound copy"
        )


def largest_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in ``weight`` [rows, columns], fp32, some rows at a time."""
    largest = torch.zeros((), device=weight.device)
    for rows in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1])):
        largest = torch.maximum(largest, rows.abs().amax().float())
    return largest


@torch.no_grad()
def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x [..., features] and fp32 scales [..., 1]: symmetric, a token at a time.

    A token of zeros has the scale 1e-30.  The division is in fp32: in bf16 the largest value of a token
    can round up to 128 and wrap.  Rounding has no gradient, so nothing here does.
    """
    tokens = x.reshape(-1, x.shape[-1])
    step = block_rows(tokens.shape[1], x.device)
    if len(tokens) <= step:
        codes, scale = _quantize_tokens(tokens)
    else:
        codes = torch.empty(tokens.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(len(tokens), 1, device=x.device)
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            codes[part], scale[part] = _quantize_tokens(tokens[part])
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _quantize_tokens(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = tokens.float()
    largest = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))
    scale = largest.div_(127).clamp_(min=1e-30)
    # No clamp to +-127: in fp32 the quotient is at most one rounding above 127.
    return (values / scale).round_().to(torch.int8), scale


SMALLEST = 2.0**-24  # fp16's least number: an int8 code times it is exact


def scaled_codes(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes times scale's power of two, in ``dtype``, and the factor that is left of scale.

    Both are exact in fp16, bf16 and fp32 but for the factor's rounding.  Integers alone would sum
    past fp16's range, and a small scale would lose its digits there; this way a product overflows
    only where its result does.
    """
    exponent = scale.view(torch.int32) & 0x7F800000  # that of an fp32 number
    power = exponent.view(torch.float32).clamp(min=SMALLEST)
    return codes.to(dtype) * power.to(dtype), (scale / power).to(dtype)


def in_blocks(
    values: Callable[[slice], torch.Tensor], packed: Packed, padded: int, dtype: torch.dtype
) -> torch.Tensor:
    """The matrix of ``packed`` in ``dtype``, some rows at a time.

    ``values`` gives the fp32 values of some rows, of ``padded`` columns each.
    """
    out = torch.empty(packed.matrix, dtype=dtype, device=packed.codes.device)
    return fill_in_blocks(out, lambda part: values(part).view(-1, padded))


def grouped(rows: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, in] as [rows, groups, size], the last group filled up with zeros."""
    rows = F.pad(rows, (0, -rows.shape[1] % size))
    return rows.view(rows.shape[0], -1, size)


def least_error(tries: Iterable[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Of every element the tables of the try with the least error, the first of equal ones.

    A try is (error, table, ...), all of one shape.
    """
    best: list[torch.Tensor] = []
    for error, *tables in tries:
        if not best:
            least, best = error, tables
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = [  # in fp32, as torch.where takes no fp8
            torch.where(better, new.float(), old.float()).to(new.dtype)
            for new, old in zip(tables, best, strict=True)
        ]
    return best


def round_to_int(values: torch.Tensor, random: torch.Generator | None) -> torch.Tensor:
    """Nearest integer, or stochastically up or down; what is on an integer (to 1e-3) stays."""
    if random is None:
        return values.round_()
    nearest = values.round()
    noise = torch.rand(values.shape, generator=random, device=values.device)
    return torch.where((values - nearest).abs() < 1e-3, nearest, values.add_(noise).floor_())
