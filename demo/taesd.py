"""Plain-torch twin of the TAESD autoencoder (madebyollin/taesd), 16 latent channels.

Parameter names are the ones ComfyUI loads under ``first_stage_model.``; the latent is trained to
unit variance, so that ComfyUI's SD3 latent format needs only its own scale and shift undone.
"""

from __future__ import annotations

import torch
from torch import nn

LATENT_CHANNELS = 16
# ComfyUI's SD3 latent format: process_in(z) = (z - shift) * scale.  Stored in the checkpoint as
# vae_scale and vae_shift, they cancel it.
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609


def _conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class _Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.fuse = nn.ReLU()

    def forward(self, x):
        return self.fuse(self.conv(x) + x)


def _blocks(width: int, n: int) -> list[nn.Module]:
    return [_Block(width) for _ in range(n)]


class TAESD(nn.Module):
    """``encode``: images [n, 3, h, w] in [0, 1] to latents [n, 16, h/8, w/8]; ``decode``: back."""

    def __init__(self, width: int = 64):
        super().__init__()

        def down():
            return [_conv(width, width, stride=2, bias=False), *_blocks(width, 3)]

        def up():
            return [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]

        self.taesd_encoder = nn.Sequential(
            _conv(3, width), *_blocks(width, 1), *down(), *down(), *down(),
            _conv(width, LATENT_CHANNELS),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            _Clamp(), _conv(LATENT_CHANNELS, width), nn.ReLU(), *_blocks(width, 3),
            *up(), *_blocks(width, 3), *up(), *_blocks(width, 3), *up(), *_blocks(width, 1),
            _conv(width, 3),
        )  # fmt: skip

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.taesd_encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.taesd_decoder(latents)
