"""int8 W8A8: a scale an output channel, activations rounded to int8 a token at run time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import (
    NativeLayout,
    Packed,
    WeightFormat,
    in_blocks,
    quantize_tokens,
    round_to_int,
    scaled_codes,
)

# A CPU scales this much of the product while it is in the cache, so many rows at once.
BLOCK_ELEMENTS, BLOCK_ROWS = 1 << 19, 1024
FEW_ROWS = 16  # up to here a CPU reads the codes faster than it converts them
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class Int8(WeightFormat):
    """ComfyUI's "int8_tensorwise" with a scale a row: a saved file opens in plain ComfyUI."""

    name = "int8"
    title = "8-bit weights and activations (W8A8)"
    word = "close"
    bits = 8.0
    native = NativeLayout("int8_tensorwise", "TensorWiseINT8Layout")
    kinds = ("linear",)
    low_bit_activations = True

    def _quantize_rows(self, rows, common, random, old):
        scale = rows.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
        if old is not None:
            fits = rows.abs().amax(1, keepdim=True) <= old["scale"] * 127.5
            scale = torch.where(fits, old["scale"], scale)
        codes = round_to_int(rows / scale, random).clamp_(-127, 127)
        return codes.to(torch.int8), {"scale": scale}

    def _dequantize_rows(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        return _dequantized(packed, dtype)

    def replaces_host(self, device):
        return torch.device(device).type == "cpu"

    def backend(self, device):
        device = torch.device(device)
        slow = device.type == "cpu" and not fast_cpu()
        return f"torch {device.type}" + (", integers as floats" if slow else "")

    def linear(self, x, packed, bias=None, weight_only=False):
        rows = x.reshape(-1, x.shape[-1])
        if not weight_only:
            out = int8_product(*quantize_tokens(rows), packed, bias, x.dtype)
        elif x.device.type == "cpu" and x.dtype != torch.float16:
            out = weight_only_product(rows, packed, bias)
        else:  # the codes' sums would overflow fp16
            return super().linear(x, packed, bias, weight_only)
        return out.reshape(*x.shape[:-1], -1)


def fast_cpu() -> bool:
    """Whether this CPU's int8 product is faster than floats: without AVX-512 it is a plain loop."""
    return AVX512


@torch.no_grad()
def weight_only_product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times the codes, then the scales and bias [out]: no dequantized copy is made."""
    scale = packed.aux["scale"].reshape(1, -1)
    if x.dtype == torch.bfloat16 and 0 < x.shape[0] <= FEW_ROWS:
        ones = torch.ones(packed.matrix[0], dtype=x.dtype)
        out = torch._weight_int8pack_mm(x.contiguous(), packed.codes, ones)
    else:
        out = F.linear(x, packed.codes.to(x.dtype))
    return scaled(out.float(), 1.0, scale, None if bias is None else bias.float()).to(x.dtype)


@torch.no_grad()
def int8_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes [rows, in] (int8) times a packed weight, times scale [rows, 1], plus bias [out].

    Where torch has no integer product for the device and the shapes, the integers are multiplied as
    floats: the same arithmetic, to the rounding of ``dtype``.
    """
    rows, device = codes.shape[0], codes.device.type
    if device == "cuda":  # which wants whole tiles
        serves = rows > 16 and all(n % 8 == 0 for n in packed.matrix)
    else:
        serves = device == "cpu" and rows > 0
    if serves:
        return scaled_int_mm(codes, scale, packed.codes, packed.aux["scale"], bias, dtype)
    return float_product(codes, scale, packed, bias, dtype)


def float_product(codes, scale, packed: Packed, bias, dtype: torch.dtype) -> torch.Tensor:
    """What ``int8_product`` gives, with the integers multiplied as floats of ``dtype``."""
    values, rest = scaled_codes(codes, scale, dtype)
    out = F.linear(values, _dequantized(packed, dtype)) * rest
    return out if bias is None else out + bias.to(dtype)


def _dequantized(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    scale = packed.aux["scale"]
    return in_blocks(
        lambda part: packed.codes[part].float().mul_(scale[part]), packed, packed.matrix[1], dtype
    )


def scaled_int_mm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes [rows, in] (int8) times weight [out, in] (int8), times both scales, plus bias [out].

    Scales are [rows, 1] and [out, 1], fp32, as is the arithmetic after the integer product.  That is
    exact; a CPU that is slow at it multiplies in fp32, which is exact up to 1040 in features.
    """
    columns = weight_scale.reshape(1, -1)
    bias = None if bias is None else bias.float()
    as_floats = codes.device.type == "cpu" and not fast_cpu()
    if as_floats:
        codes = codes.float()
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        product = codes @ weight.float().t() if as_floats else torch._int_mm(codes, weight.t())
        return scaled(product.float(), scale, columns, bias).to(dtype)
    rows, outputs = codes.shape[0], weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype)
    height = min(rows, BLOCK_ROWS)
    width = min(outputs, BLOCK_ELEMENTS // height)
    whole = torch.empty(height * width)
    whole_int = None if as_floats else torch.empty_like(whole, dtype=torch.int32)
    for left in range(0, outputs, width):
        across = slice(left, min(outputs, left + width))
        some_bias = None if bias is None else bias[across]
        some_weight = weight[across].t()
        if as_floats:
            some_weight = some_weight.float()
        for top in range(0, rows, height):
            down = slice(top, min(rows, top + height))
            shape = (down.stop - top, across.stop - left)
            values = whole[: shape[0] * shape[1]].view(shape)
            if as_floats:
                torch.mm(codes[down], some_weight, out=values)
            else:
                product = whole_int[: values.numel()].view(shape)
                torch._int_mm(codes[down], some_weight, out=product)
                values.copy_(product)
            out[down, across] = scaled(values, scale[down], columns[:, across], some_bias)
    return out


@torch.no_grad()
def scaled(product, rows, columns, bias) -> torch.Tensor:
    """product * rows * columns + bias, in place of ``product``."""
    product.mul_(rows)
    if bias is None:
        return product.mul_(columns)
    return torch.addcmul(bias, product, columns, out=product)
