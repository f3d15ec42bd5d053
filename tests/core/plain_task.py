"""A plain-torch task for the tests of the commands: a colour a prompt, and a model that stops short."""

from __future__ import annotations

import os
import time

import torch

from qsched_core.task import Task

SIZE = 32


def color(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(prompt.encode()))
    return torch.rand(3, 1, 1, generator=generator)


def initial(seeds):
    return torch.stack(
        [
            torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(s % 2**31))
            for s in seeds
        ]
    )


def task(error: float, name: str, source: str = "these weights", **more) -> Task:
    def denoise(x, sigma, target):
        time.sleep(float(os.environ.get("PLAIN_TASK_SLEEP", "0")))
        assert len(target) == len(x)
        return target + error * (x - target)

    return Task(
        denoise,
        initial,
        lambda prompts: {"target": torch.stack([color(p) for p in prompts])},
        lambda latents: latents.clamp(0, 1).movedim(1, -1),
        **{
            "sigmas": (1.0, 0.7, 0.3, 0.0),
            "width": SIZE,
            "height": SIZE,
            "provenance": {"model": name, "source_hash": source, "patches": ""},
            "max_batch": 16,
        }
        | more,
    )


def quantized(device):
    return task(0.4, "quantized")


def full(device):
    return task(0.1, "full")


def other_steps(device):
    return task(0.1, "full", sigmas=(1.0, 0.5, 0.0))


def other_model(device):
    return task(0.1, "full", "other weights")


def broken(device):
    return "no task"


def without_device():
    return quantized(None)
