"""Train the demo's autoencoder: ``python -m demo.train_vae --steps 2500``.

Encoder and decoder together, on crops for the first three quarters, then on whole pictures.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F

from .shapes import render, sample_scenes
from .taesd import TAESD
from .training import WORK_DIR, Progress, cosine, psnr, save_weights

CROP = 48


def _random_crop(images: torch.Tensor) -> torch.Tensor:
    y, x = torch.randint(0, (images.shape[-1] - CROP) // 8 + 1, (2,)).tolist()
    return images[:, :, y * 8 : y * 8 + CROP, x * 8 : x * 8 + CROP]


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(out), _edges(target), strict=True))
    return 0.5 * F.l1_loss(out, target) + 8 * F.mse_loss(out, target) + 0.25 * edges


@torch.no_grad()
def evaluate(vae: TAESD, n: int = 128) -> dict[str, float]:
    rng = np.random.default_rng(2)
    images = render(sample_scenes(n, rng, held_out=True), rng)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).float()
        out = vae.decode(latents).float().clamp(0, 1)
    return {
        "psnr_db": psnr(out, images),
        "latent_std": latents.std().item(),
        "latent_max": latents.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.05, help="latent noise, in unit latents")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    vae = TAESD()
    vae = vae.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = Progress(args.steps)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps)
        images = render(sample_scenes(args.batch, rng), rng)
        if step < 0.75 * args.steps:
            images = _random_crop(images)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).float()
            noisy = latents + args.noise * torch.rand(len(images), 1, 1, 1) * torch.randn_like(
                latents
            )
            out = vae.decode(noisy).float()
        loss = reconstruction_loss(out, images)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        loss = loss + 0.02 * (mean.square().mean() + (std - 1).square().mean())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(ema.parameters(), vae.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
        progress(step, loss=loss.item(), mse=F.mse_loss(out, images).item())
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            figures = evaluate(ema)
            print(figures, flush=True)
            save_weights(ema, WORK_DIR / "vae.safetensors", **figures)


if __name__ == "__main__":
    main()
