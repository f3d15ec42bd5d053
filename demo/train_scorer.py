"""Train the demo's scorer, a small open_clip dual encoder: ``python -m demo.train_scorer``.

Two tasks share one embedding: captions (contrastive, clean and damaged pictures alike) and quality
(a picture against the antonym prompts of CLIP-IQA, arXiv 2207.12396).  Good pictures are drawn ones
and the autoencoder's round trips of them; bad ones are damaged (``degrade.py``) or decoded from a
noisy latent.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from .degrade import TRAINED, UNSEEN, degrade
from .shapes import COLOURS, SHAPES, Scene, render, sample_scenes
from .taesd import TAESD
from .training import WORK_DIR, Progress, cosine, load_weights, save_weights

CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 96, "layers": 4, "width": 192, "head_width": 64, "patch_size": 12,
        },
        "text_cfg": {
            "context_length": 24, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 3,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}  # fmt: skip
QUALITY_PROMPTS = (("Good photo.", "Bad photo."), ("Good picture.", "Bad picture."))


def build() -> open_clip.CLIP:
    return open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(
        context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )


def embed(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k])[:, None, None] for k in ("mean", "std"))
    with torch.autocast("cpu", torch.bfloat16):
        return model.encode_image((images - mean) / std, normalize=True).float()


class Pictures:
    """Captioned pictures: drawn on the fly, with a pool of autoencoder outputs mixed in."""

    def __init__(self, rng: np.random.Generator, pool: int):
        self.rng = rng
        vae = load_weights(TAESD(), WORK_DIR / "vae.safetensors")
        vae = vae.to(memory_format=torch.channels_last)
        self.scenes = sample_scenes(pool, rng)
        good, bad = [], []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, pool, 50):
                images = render(self.scenes[start : start + 50], rng)
                latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).float()
                noisy = latents + torch.randn_like(latents) * (
                    0.15 + 0.5 * torch.rand(len(images), 1, 1, 1)
                )
                good.append(vae.decode(latents).float().clamp(0, 1))
                bad.append(vae.decode(noisy).float().clamp(0, 1))
        self.good, self.bad = torch.cat(good), torch.cat(bad)

    def batch(self, n: int) -> tuple[torch.Tensor, list[Scene], torch.Tensor]:
        """n pictures in quarters: drawn, round trips, damaged, noisy latents; bad [n] marks the last two."""
        quarter = n // 4
        drawn = sample_scenes(2 * quarter, self.rng)
        images = render(drawn, self.rng)
        pick = [
            torch.from_numpy(self.rng.integers(len(self.scenes), size=quarter)) for _ in range(2)
        ]
        images = torch.cat(
            [images[:quarter], self.good[pick[0]], degrade(images[quarter:], 4), self.bad[pick[1]]]
        )
        pooled = [[self.scenes[i] for i in p] for p in pick]
        scenes = drawn[:quarter] + pooled[0] + drawn[quarter:] + pooled[1]
        return images, scenes, torch.arange(4 * quarter) >= 2 * quarter


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one colour, shape or the background changed: a hard negative."""
    colours, shapes = list(COLOURS), list(SHAPES)
    while True:
        which, what = int(rng.integers(len(scene.things))), int(rng.integers(3))
        colour, shape = scene.things[which]
        background = scene.background
        if what == 0:
            colour = colours[rng.integers(len(colours))]
        elif what == 1:
            shape = shapes[rng.integers(len(shapes))]
        else:
            background = colours[rng.integers(len(colours))]
        things = tuple((colour, shape) if i == which else t for i, t in enumerate(scene.things))
        other = Scene(scene.kind, things, background, scene.where, scene.size)
        clear = all(thing[0] != background for thing in things)
        if other != scene and clear and len(set(things)) == len(things):
            return other


@torch.no_grad()
def evaluate(model: open_clip.CLIP, n: int = 512) -> dict[str, float]:
    model.eval()
    tokenize, rng = tokenizer(), np.random.default_rng(999)
    state = torch.random.get_rng_state()
    torch.manual_seed(999)
    scenes = list(dict.fromkeys(sample_scenes(n, rng, held_out=True)))
    images = render(scenes, rng)

    def text(captions):
        return model.encode_text(tokenize(list(captions)), normalize=True)

    captions = text(s.caption() for s in scenes)
    features = torch.cat([embed(model, part) for part in images.split(128)])
    negatives = text(altered(s, rng).caption() for s in scenes)
    right = (features * captions).sum(1)
    best = (features @ captions.T).argmax(1)
    good, bad = text(QUALITY_PROMPTS[0])
    scale = model.logit_scale.exp()

    def quality(pictures):
        f = torch.cat([embed(model, part) for part in pictures.split(128)])
        return torch.sigmoid(scale * (f @ good - f @ bad))

    clean = quality(images)
    figures = {
        "captions": len(scenes),
        "recall_at_1": (best == torch.arange(len(scenes))).float().mean().item(),
        "hard_negative_accuracy": (right > (features * negatives).sum(1)).float().mean().item(),
        "cosine": right.mean().item(),
    }
    for kind in TRAINED + UNSEEN:
        damaged = quality(degrade(images, kinds=(kind,)))
        auc = (clean[:, None] > damaged[None]).float().mean().item()
        figures[f"quality_auc_{kind.__name__}"] = auc
    torch.random.set_rng_state(state)
    model.train()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality-weight", type=float, default=1.0)
    parser.add_argument("--init", type=Path, help="continue from these weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    pictures = Pictures(rng, args.pool)
    model, tokenize = build().train(), tokenizer()
    if args.init is not None:
        load_weights(model, args.init)
    # The good and bad prompts start out alike, which leaves the picture side without a gradient:
    # a linear probe, thrown away after training, gives it one.
    probe = torch.nn.Linear(CONFIG["model_cfg"]["embed_dim"], 1)
    ema = copy.deepcopy(model).requires_grad_(False)
    quality_ids = tokenize([prompt for pair in QUALITY_PROMPTS for prompt in pair])
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probe.parameters()], args.lr, betas=(0.9, 0.98), weight_decay=0.02
    )
    progress = Progress(args.steps)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps)
        images, scenes, bad = pictures.batch(args.batch)
        ids = torch.cat([tokenize([scene.caption() for scene in scenes]), quality_ids])
        with torch.autocast("cpu", torch.bfloat16):
            text = model.encode_text(ids, normalize=True).float()
        image = embed(model, images)
        scale = model.logit_scale.exp().clamp(max=60)
        logits = scale * image @ text[: len(scenes)].T
        target = torch.arange(len(scenes))
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        quality = sum(
            F.cross_entropy(scale * image @ pair.T, bad.long())
            for pair in text[len(scenes) :].split(2)
        ) / len(QUALITY_PROMPTS)
        probed = F.binary_cross_entropy_with_logits(10 * probe(image).squeeze(1), 1 - bad.float())
        loss = contrastive + args.quality_weight * (quality + probed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(60)))
            decay = min(0.998, (step + 1) / (step + 20))
            for a, b in zip(ema.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
        progress(
            step,
            contrastive=contrastive.item(),
            quality=quality.item(),
            probe=probed.item(),
            scale=scale.item(),
        )
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            figures = evaluate(ema)
            print(json.dumps(figures), flush=True)
            save_weights(
                ema, WORK_DIR / "scorer.safetensors", open_clip_config=CONFIG, figures=figures
            )


if __name__ == "__main__":
    main()
