"""Quantizing a plain torch model: what ComfyUI is not needed for."""

from __future__ import annotations

import torch
from torch import nn

from .base import FormatError, Packed
from .policy import Choice, Policy
from .registry import get


class _Quantized(nn.Module):
    """What both layers share: packed weights as buffers, and a bias."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None, choice: Choice):
        super().__init__()
        self.shape, self.options = packed.shape, dict(packed.options)
        self.format, self.weight_only = choice.format, choice.weight_only
        self.register_buffer("codes", packed.codes)
        for name, table in packed.aux.items():
            self.register_buffer(name, table)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Packed:
        aux = {name: getattr(self, name) for name in get(self.format).aux}
        return Packed(self.codes, aux, self.shape, self.options)

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.format}, weight_only={self.weight_only}"


class QuantizedLinear(_Quantized):
    """A linear layer on packed weights; its state dict holds codes, tables and bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        return get(self.format).linear(x, self.packed, self._bias(x), self.weight_only)


class QuantizedConv2d(_Quantized):
    """A convolution like ``conv`` on packed weights, dequantized when it runs."""

    def __init__(self, conv: nn.Conv2d, packed: Packed, choice: Choice, bias: torch.Tensor | None):
        super().__init__(packed, bias, choice)
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, height, width] to [batch, out, height, width], in x's dtype."""
        weight = get(self.format).dequantize(self.packed, x.dtype)
        return nn.functional.conv2d(
            x, weight, self._bias(x), self.stride, self.padding, self.dilation, self.groups
        )


def quantize_module(
    module: nn.Module,
    policy: Policy | str,
    prefix: str = "",
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace the linear layers and convolutions that ``policy`` (or a format's name) chooses.

    The module is changed in place and returned, one layer at a time; each weight is quantized on
    ``device`` (its own, if None) and stays there.  FormatError names the layer.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    for name, child in list(module.named_children()):
        full = f"{prefix}{name}"
        kind = {nn.Linear: "linear", nn.Conv2d: "conv2d"}.get(type(child))
        if kind == "conv2d" and child.padding_mode != "zeros":
            kind = None
        choice = Choice(None)
        if kind is not None:
            choice = policy(full, tuple(child.weight.shape), kind)
        if choice.format is None:
            quantize_module(child, policy, f"{full}.", device)
            continue
        try:
            weight = child.weight.detach().to(device or child.weight.device)
            packed = get(choice.format).quantize(weight)
        except FormatError as error:
            raise FormatError(f"layer {full}: {error}") from error
        if kind == "linear":
            setattr(module, name, QuantizedLinear(packed, child.bias, choice))
        else:
            setattr(module, name, QuantizedConv2d(child, packed, choice, child.bias))
    return module
