"""Quantizing a plain torch model: what ComfyUI is not needed for."""

from __future__ import annotations

import torch
from torch import nn

from .base import Packed
from .policy import Policy
from .registry import get


class QuantizedLinear(nn.Module):
    """A linear layer on packed weights; its state dict holds codes, tables and bias."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None, format: str, weight_only: bool):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format, self.weight_only = format, weight_only
        self.register_buffer("codes", packed.codes)
        for name, table in packed.aux.items():
            self.register_buffer(name, table)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Packed:
        aux = {name: getattr(self, name) for name in get(self.format).aux}
        return Packed(self.codes, aux, (self.out_features, self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return get(self.format).linear(x, self.packed, bias, self.weight_only)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}, weight_only={self.weight_only}"


def quantize_module(module: nn.Module, policy: Policy | str, prefix: str = "") -> nn.Module:
    """Replace the linear layers of ``module`` that ``policy`` (or a format's name) chooses.

    The module is changed in place and returned, one layer at a time; FormatError names the layer.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    for name, child in list(module.named_children()):
        full = f"{prefix}{name}"
        choice = None
        if type(child) is nn.Linear:
            choice = policy(full, tuple(child.weight.shape))
        if choice is None:
            quantize_module(child, policy, f"{full}.")
            continue
        packed = get(choice.format).quantize(child.weight.detach())
        new = QuantizedLinear(packed, child.bias, choice.format, choice.weight_only)
        setattr(module, name, new)
    return module
