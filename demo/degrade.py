"""What the demo's quality scorer learns to dislike: ways a picture can go wrong.

Each function takes images [n, 3, h, w] in [0, 1] and returns the damaged ones; the strength is
drawn per picture where that is cheap, else per call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _uniform(n: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1)


def _gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = max(1, int(3 * sigma))
    taps = torch.exp(-(torch.arange(-radius, radius + 1).float() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius,) * 4, mode="replicate"), taps, groups=3)
    return F.conv2d(x, taps.transpose(2, 3), groups=3)


def blur(x: torch.Tensor) -> torch.Tensor:
    return _gaussian_blur(x, float(_uniform(1, 1.0, 3.0)))


def noise(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x) * _uniform(len(x), 0.04, 0.2)


def blotches(x: torch.Tensor) -> torch.Tensor:
    cells = int(torch.randint(6, 17, (1,)))
    patches = torch.randn(len(x), 3, cells, cells) * _uniform(len(x), 0.05, 0.22)
    return x + F.interpolate(patches, size=x.shape[-2:], mode="bilinear")


def colour_shift(x: torch.Tensor) -> torch.Tensor:
    n = len(x)
    contrast = torch.where(
        torch.rand(n, 1, 1, 1) < 0.5, _uniform(n, 0.35, 0.7), _uniform(n, 1.35, 1.9)
    )
    return (x - 0.5) * contrast + 0.5 + (torch.rand(n, 3, 1, 1) - 0.5) * 0.2


def ringing(x: torch.Tensor) -> torch.Tensor:
    return x + (x - _gaussian_blur(x, float(_uniform(1, 1.0, 3.0)))) * _uniform(len(x), 1.0, 2.2)


def warp(x: torch.Tensor) -> torch.Tensor:
    shift = F.interpolate(
        torch.randn(len(x), 2, 8, 8) * _uniform(len(x), 0.03, 0.08), x.shape[-2:], mode="bicubic"
    )
    grid = F.affine_grid(torch.eye(2, 3).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(
        x, grid + shift.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )


def pixelate(x: torch.Tensor) -> torch.Tensor:
    size = int(torch.randint(3, 7, (1,)))
    return F.interpolate(F.avg_pool2d(x, size, ceil_mode=True), x.shape[-2:], mode="nearest")


TRAINED = (blur, noise, blotches, colour_shift, ringing, warp)
UNSEEN = (pixelate,)  # never trained on, only measured


def degrade(x: torch.Tensor, group: int = 8, kinds=TRAINED) -> torch.Tensor:
    """Damage every picture, each ``group`` of them in one randomly chosen way."""
    parts = [
        kinds[int(torch.randint(len(kinds), (1,)))](part).clamp(0, 1) for part in x.split(group)
    ]
    return torch.cat(parts)
