"""Kinds of layers that are rounded: the rows of inputs that their matrix multiplies, and how they run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..formats.module import QuantizedConv2d, QuantizedLinear
from ..formats.policy import Choice
from .layer import Calibrated


def kind_of(layer: nn.Module) -> str | None:
    """ "linear" or "conv2d", as a policy calls it; None for a layer that is never rounded.

    A loader's own kind of nn.Linear is one; the projection inside of nn.MultiheadAttention, which
    does not run by its own forward, is not, and neither is a weight that is no plain tensor of floats.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if isinstance(layer, nn.Linear):
        return None if isinstance(layer, NonDynamicallyQuantizableLinear) else "linear"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        return "conv2d"
    return None


def unable(layer: nn.Module) -> str | None:
    """Why a layer's inputs have no statistics, or None."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "its channels are in groups, each with inputs of its own"
    return None


def keeps_inputs(layer: nn.Module) -> bool:
    """Whether a layer never rounds its inputs: a convolution runs on its dequantized weight."""
    return isinstance(layer, nn.Conv2d)


def columns_of(layer: nn.Module) -> int:
    """Columns of the matrix that is packed."""
    return math.prod(layer.weight.shape[1:])


def count_of(layer: nn.Module, x: torch.Tensor) -> int:
    """How many rows ``rows_of`` gives."""
    if not isinstance(layer, nn.Conv2d):
        return x.numel() // x.shape[-1]
    sizes = []
    for k, size in enumerate(x.shape[-2:]):
        low, high = _padding(layer)[k]
        reach = layer.dilation[k] * (layer.kernel_size[k] - 1)
        sizes.append((size + low + high - reach - 1) // layer.stride[k] + 1)
    return math.prod(x.shape[:-3]) * sizes[0] * sizes[1]


def rows_of(layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The layer's inputs x as rows [..., columns] of which each gives its own outputs.

    A convolution's, unfolded, are several times as large as x: one picture at a time.
    """
    if not isinstance(layer, nn.Conv2d):
        yield x
        return
    (top, bottom), (left, right) = _padding(layer)
    for picture in x.reshape(-1, *x.shape[-3:]).float().split(1):
        wide = F.pad(picture, (left, right, top, bottom))
        found = F.unfold(wide, layer.kernel_size, layer.dilation, 0, layer.stride)
        yield found[0].t()


def _padding(layer: nn.Conv2d) -> list[tuple[int, int]]:
    """Zeros before and after each of the two dimensions."""
    if layer.padding == "valid":
        return [(0, 0), (0, 0)]
    if layer.padding == "same":
        reaches = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(reach // 2, reach - reach // 2) for reach in reaches]
    return [(size, size) for size in layer.padding]


def packed_layer(layer: nn.Module, rounded: Calibrated, choice: Choice) -> nn.Module:
    """What runs in the place of ``layer``."""
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, rounded.packed, choice, rounded.bias)
    return QuantizedLinear(rounded.packed, rounded.bias, choice)
