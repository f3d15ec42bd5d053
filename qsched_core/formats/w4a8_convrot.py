"""W4A8 in a rotated basis: comfy-kitchen's grouped W4A8, from its version 0.2.28 on."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from ..devices import place
from ..optional import missing
from .base import CHUNK_ELEMENTS, Error, Packed, check_finite
from .kitchen import KitchenFormat, backend, kitchen, rotation_size

OLDEST = "0.2.28"  # its quantizer rounds stochastically, which baking a LoRA needs


@lru_cache(maxsize=1)
def _found() -> str | None:
    """None if the installed comfy-kitchen has what is needed, else its version."""
    quantizer = getattr(kitchen("w4a8_convrot"), "quantize_w4a8_int8_weight", None)
    if quantizer and "stochastic_rounding" in inspect.signature(quantizer).parameters:
        return None
    try:
        return version("comfy-kitchen")
    except PackageNotFoundError:
        return "an unknown version"


class W4A8ConvRot(KitchenFormat):
    """A codebook of 16 levels for the rotated weight, an fp8 scale every 16, int8 activations a token.

    Quantizer, arithmetic and layout are comfy-kitchen's ("AsymW4A8Int8Layout"): scale [out, in / 16],
    s_channel [out] in fp32, codebook [16].  Each level times its group's scale is an int8 number, so
    the product is that of two int8 matrices.
    """

    name = "w4a8_convrot"
    title = "4-bit weights in groups of 16, 8-bit activations, rotated against outliers"
    word = "good"
    bits = 4.5
    kinds = ("linear",)
    aux = ("scale", "s_channel", "codebook")
    group_size = 16
    by_rows = False

    def unfit(self, shape):
        return super().unfit(shape) or self.unfit_columns(shape[1], self.group_size)

    def refusal(self, at):
        reason = self.before_sm80(at) or missing("comfy_kitchen", self.name, "comfy-kitchen")
        if reason is None and _found() is not None:
            reason = (
                f"{self.name} needs comfy-kitchen {OLDEST} or newer, which comes with a newer "
                f"ComfyUI; found {_found()}; nothing would run instead: choose w4a8"
            )
        return reason

    def backend(self, device):
        at = place(device)
        return f"comfy-kitchen {backend('w4a8_int8_linear', at)} {at}"

    def packed_bytes(self, shape):
        rows, columns = shape
        return rows * columns // 2 + rows * columns // self.group_size + 4 * rows + 4 * 16

    def quantize(self, weight, seed=None, like=None, measure=False):
        """As every format; with ``like`` the codebook stays, and rows that did not change do."""
        self.check(weight, like)
        step = max(1, CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), step):
            check_finite(weight[start : start + step], start)
        size = rotation_size(weight.shape[1])
        codes, scale, channel, _, codebook = kitchen(self.name).quantize_w4a8_int8_weight(
            weight.float(),
            group_size=self.group_size,
            convrot_groupsize=size,
            codebook_tensor=None if like is None else like.aux["codebook"],
            stochastic_rounding=0 if seed is None else (seed & 0x7FFFFFFF) + 1,
        )
        aux = {"scale": scale, "s_channel": channel, "codebook": codebook}
        packed = Packed(codes, aux, tuple(weight.shape), {"convrot_groupsize": size})
        if like is not None:
            for start in range(0, len(weight), step):
                self._keep(packed, like, slice(start, start + step), weight)
        if not measure:
            return packed
        error = Error()
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            error.add(self._rows(packed, part, torch.float32), weight[part])
        return Packed(codes, aux, packed.shape, packed.options, error.relative())

    def _keep(self, packed: Packed, like: Packed, part: slice, weight: torch.Tensor) -> None:
        """Give ``packed`` those rows of ``like`` that still stand for the weight's."""
        rows = weight[part].float()
        change = (rows - self._rows(like, part, torch.float32)).abs().amax(1)
        same = change <= 1e-6 * rows.abs().amax(1)
        packed.codes[part][same] = like.codes[part][same]
        for name in ("scale", "s_channel"):
            packed.aux[name][part][same] = like.aux[name][part][same]

    def _quantize_rows(self, rows, common, random, old):
        raise NotImplementedError("the codebook needs the whole weight: see quantize")

    def _rows(self, packed: Packed, part: slice, dtype: torch.dtype) -> torch.Tensor:
        unpack, aux = kitchen(self.name).dequantize_w4a8_int8_weight, packed.aux
        return unpack(
            packed.codes[part],
            aux["scale"][part],
            aux["s_channel"][part],
            codebook=aux["codebook"],
            group_size=self.group_size,
            convrot_groupsize=packed.options["convrot_groupsize"],
            output_dtype=dtype,
        )

    def _dequantize_rows(self, packed, dtype):
        return self._rows(packed, slice(None), dtype)

    def _product(self, tokens, packed, bias):
        aux = packed.aux
        return kitchen(self.name).w4a8_int8_linear(
            tokens.contiguous(),
            packed.codes,
            aux["scale"],
            aux["s_channel"],
            codebook=aux["codebook"],
            bias=bias,
            group_size=self.group_size,
            convrot_groupsize=packed.options["convrot_groupsize"],
            out_dtype=tokens.dtype,
        )
