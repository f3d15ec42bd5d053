"""Train the demo's generator on the autoencoder's latents: ``python -m demo.train_mmdit``.

Rectified flow, x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0, with sigma drawn near
the middle and shifted by 3 as SD3 does (arXiv 2403.03206, sections 3.1 and 5.3.2).  Matrices inside
the blocks are trained by Muon, everything else by AdamW.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .mmdit import TEXT_TOKENS, MMDiT
from .shapes import render, sample_scenes
from .taesd import TAESD
from .text import embedding_tables, tokenize
from .training import WORK_DIR, Progress, cosine, load_weights, save_weights

SHIFT = 3.0


@torch.no_grad()
def make_latents(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n, 16, 12, 12] (float16) and token ids [n, 21] of n training pictures, cached."""
    path = WORK_DIR / f"latents_{n}.safetensors"
    if not path.exists():
        rng = np.random.default_rng(seed)
        vae = load_weights(TAESD(), WORK_DIR / "vae.safetensors")
        vae = vae.to(memory_format=torch.channels_last)
        latents, ids = [], []
        progress = Progress(n // 100)
        for step in range(n // 100):
            scenes = sample_scenes(100, rng)
            images = render(scenes, rng).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(images).half())
            ids.append(tokenize([scene.caption() for scene in scenes])[:, :TEXT_TOKENS])
            progress(step)
        latents = torch.cat(latents).contiguous()
        save_file({"latents": latents, "ids": torch.cat(ids)}, path)
    data = load_file(path)
    return data["latents"], data["ids"]


def optimizers_for(model: MMDiT, lr: float) -> list[torch.optim.Optimizer]:
    hidden, rest = [], []
    for name, param in model.named_parameters():
        in_block = name.startswith("joint_blocks") and "adaLN" not in name
        (hidden if in_block and param.ndim == 2 else rest).append(param)
    return [
        torch.optim.Muon(hidden, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--init", type=Path, help="continue from these weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    latents, ids = make_latents(args.images, args.seed)
    unique, inverse = torch.unique(ids, return_inverse=True)
    tokens, positions = embedding_tables()
    tokens, positions = tokens[unique].float(), positions[:TEXT_TOKENS].float()
    empty = torch.searchsorted(unique, tokenize([""])[0, :TEXT_TOKENS])

    model = MMDiT()
    if args.init is not None:
        load_weights(model, args.init)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = optimizers_for(model, args.lr)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    forward = torch.compile(model) if args.compile else model
    progress = Progress(args.steps)
    for step in range(args.steps):
        factor = cosine(step, args.steps)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        pick = torch.randint(0, len(latents), (args.batch,))
        x0, text = latents[pick].float(), inverse[pick].clone()
        text[torch.rand(args.batch) < 0.05] = empty
        context = (tokens[text] + positions).bfloat16()
        u = torch.where(
            torch.rand(args.batch) < 0.7,
            torch.sigmoid(torch.randn(args.batch)),
            torch.rand(args.batch),
        )
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn_like(x0)
        noisy = torch.lerp(x0, noise, sigma[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = forward(noisy, sigma, context)
        loss = F.mse_loss(velocity.float(), noise - x0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(ema.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
        progress(step, loss=loss.item())
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_weights(ema, WORK_DIR / "mmdit.safetensors", steps=step + 1)


if __name__ == "__main__":
    main()
