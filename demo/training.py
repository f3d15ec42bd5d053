"""What the demo's training scripts share: paths, resumable checkpoints, a log line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORK_DIR = Path(__file__).parent / ".work"
WEIGHTS_DIR = Path(__file__).parent / "weights"


def cosine(step: int, total: int, warmup: int = 100, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to ``floor``."""
    return min(1.0, (step + 1) / warmup) * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return -10 * math.log10(torch.nn.functional.mse_loss(a, b).item())


def save_weights(module: torch.nn.Module | dict, path: Path, **metadata) -> None:
    state = module if isinstance(module, dict) else module.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {k: v.detach().contiguous() for k, v in state.items()},
        partial,
        metadata={k: json.dumps(v) for k, v in metadata.items()},
    )
    partial.replace(path)


def load_weights(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return module


class Progress:
    """Prints a line every ``every`` steps with the running mean of each figure."""

    def __init__(self, total: int, every: int = 50):
        self.total, self.every, self.start = total, every, time.time()
        self.sums: dict[str, float] = {}

    def __call__(self, step: int, **figures: float) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        if (step + 1) % self.every == 0:
            means = " ".join(f"{k} {v / self.every:.5f}" for k, v in self.sums.items())
            elapsed = time.time() - self.start
            print(f"{step + 1}/{self.total} {elapsed:.0f}s {means}", flush=True)
            self.sums.clear()
