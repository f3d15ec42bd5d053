"""The formats of comfy-kitchen's arithmetic, their bounds, and tensors to try them on."""

from __future__ import annotations

import pytest
import torch

from qsched_core import formats

# Relative error of a Gaussian weight and of the layer's output; bits a weight at [1024, 2048].
BOUNDS = {
    "int8_convrot": (0.0085, 0.013, 8.02),
    "w4a4": (0.152, 0.216, 4.02),
    "w4a8_convrot": (0.075, 0.075, 4.52),
    "svdquant_w4a4": (0.098, 0.147, 5.02),
    "fp8_e4m3": (0.027, 0.0385, 8.001),
    "nvfp4": (0.096, 0.136, 4.51),
    "mxfp8": (0.027, 0.0385, 8.26),
}


def where_it_is(name: str):
    """The format's name; skipped where the installed comfy-kitchen is too old for it."""
    old = formats.get(name).available("cpu") if name == "w4a8_convrot" else None
    return pytest.param(name, marks=pytest.mark.skipif(bool(old), reason=str(old)))


ALL = pytest.mark.parametrize("name", [where_it_is(name) for name in BOUNDS])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def same(a, b) -> bool:
    return same_bits(a.codes, b.codes) and all(same_bits(a.aux[k], b.aux[k]) for k in a.aux)
