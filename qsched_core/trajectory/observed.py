"""A model watched along a trajectory: what it was given, and what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..solvers import ModelInfo, sample_steps
from .rollout import per_sample_noise
from .trajectory import Trajectory


@dataclass(frozen=True)
class Observed:
    """A model along a trajectory: noise levels [steps], and latents and predictions at them.

    Tensors [prompts, ...], one a step, on the CPU; predictions are of the guided clean latents.
    ``nfe`` counts every latent that went through the model, kept here or not.
    """

    sigmas: tuple[float, ...]
    latents: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    nfe: int


def observed(
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    trajectory: Trajectory,
    *,
    info: ModelInfo,
    seeds: Sequence[int],
    at: Observed | None = None,
    extra_args: dict | None = None,
) -> Observed:
    """The model at the levels and latents of ``at``; without it along ``trajectory`` from x.

    Every sample has its own seed, as in a rollout.  Where a step has two evaluations, the first is
    taken.
    """
    made = 0
    seen: dict[int, tuple[float, torch.Tensor, torch.Tensor]] = {}
    ends = sigmas[1:].tolist()

    def watched(x, sigma, **extra):
        nonlocal made
        made += len(x)
        out, level = model(x, sigma, **extra), float(sigma[0])
        step = next(i for i, end in enumerate(ends) if level > end)
        seen.setdefault(step, (level, x.cpu(), out.cpu()))
        return out

    if at is None:
        sample_steps(
            trajectory.bind(info),
            watched,
            x,
            sigmas,
            extra_args,
            noise=lambda source: per_sample_noise(source, x, sigmas, seeds, 1),
        )
    else:
        for level, latents in zip(at.sigmas, at.latents, strict=True):
            watched(latents.to(x), sigmas.new_full((len(x),), level), **(extra_args or {}))
    return Observed(*zip(*(seen[step] for step in sorted(seen)), strict=True), made)
