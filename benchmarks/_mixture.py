"""A Gaussian mixture with its exact denoiser: a flow whose true solution is known to any precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from qsched_core.objective import Scores
from qsched_core.prompts import PromptSet
from qsched_core.sigmas import divided
from qsched_core.solvers import ModelInfo, sample_euler
from qsched_core.trajectory import (
    Candidate,
    EvaluationMemo,
    Observed,
    Trajectory,
    by_trajectory,
    observed,
    rollout,
)

COMPONENTS, DIMENSIONS, DEVIATION = 12, 64, 0.25
EXACT_STEPS = 1000


class Mixture:
    """Equal components around unit Gaussian means; x_t = (1 - t) x_0 + t noise."""

    def __init__(self, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.means = torch.randn(COMPONENTS, DIMENSIONS, generator=draw, dtype=torch.float64)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        """E[x_0 | x] for x [n, dimensions] at sigma [n], all at one level."""
        noise = float(sigma.reshape(-1)[0])
        signal = 1 - noise
        variance = (signal * DEVIATION) ** 2 + noise**2
        apart = x.double().unsqueeze(1) - signal * self.means
        weights = torch.softmax(-apart.square().sum(-1) / (2 * variance), -1)
        each = self.means + signal * DEVIATION**2 / variance * apart
        return (weights.unsqueeze(-1) * each).sum(1).to(x)


def noise_of(seeds: Sequence[int]) -> torch.Tensor:
    """Initial latents [seeds, dimensions], each from its seed alone."""
    draws = [
        torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(draws)


def prompts(count: int, first_seed: int) -> PromptSet:
    seeds = tuple(range(first_seed, first_seed + count))
    return PromptSet(tuple(f"sample {seed}" for seed in seeds), seeds)


class MixtureSource:
    """The mixture's end points as pictures [8, 8, 1] of a source: nothing is rounded to levels."""

    width = height = 8
    max_batch = 4096

    def __init__(self, trajectory: Trajectory, model: Callable | None = None):
        self.trajectory, self.nfe = trajectory, 0
        self.model, self.info = model or Mixture(), ModelInfo(True)
        self._memo = EvaluationMemo()

    def describe(self) -> dict[str, Any]:
        return {"model": {"name": "mixture"}, "sampling": self.trajectory.describe()}

    @torch.no_grad()
    def images(self, prompts: PromptSet, candidates: Sequence[Candidate], on_step=None):
        out = torch.empty(len(candidates), len(prompts), 8, 8, 1, dtype=torch.float64)
        for group in by_trajectory(candidates):
            sigmas = candidates[group[0]].trajectory.sigmas
            made = rollout(
                self.model,
                noise_of(prompts.seeds) * sigmas[0],
                torch.tensor(sigmas, dtype=torch.float64),
                [candidates[k] for k in group],
                info=self.info,
                seeds=prompts.seeds,
                samples=prompts.seeds,
                memo=self._memo,
            )
            self.nfe += made.nfe
            out[group] = made.latents.unflatten(-1, (8, 8, 1))
        return out

    @torch.no_grad()
    def observed(
        self,
        prompts: PromptSet,
        at: Observed | None = None,
        trajectory: Trajectory | None = None,
        on_evaluation: Callable[[float], None] = lambda sigma: None,
    ) -> Observed:
        along = trajectory or self.trajectory

        def model(x, sigma):
            on_evaluation(float(sigma[0]))
            return self.model(x, sigma)

        found = observed(
            model,
            noise_of(prompts.seeds) * along.sigmas[0],
            torch.tensor(along.sigmas, dtype=torch.float64),
            along,
            info=self.info,
            seeds=prompts.seeds,
            at=at,
        )
        self.nfe += found.nfe
        return found

    def fine(self, steps: int) -> Trajectory:
        own = self.trajectory
        return Trajectory(divided((own.sigmas[0], own.sigmas[-1]), steps, own.flow), own.flow)


class Nearness:
    """A measure: minus the distance of an end point to the solution of 1000 steps of Euler."""

    def __init__(self, model: Callable | None = None):
        self.model = model or Mixture()
        self._solutions: dict[int, torch.Tensor] = {}

    @cached_property
    def _sigmas(self) -> torch.Tensor:
        return torch.linspace(1, 0, EXACT_STEPS + 1, dtype=torch.float64)

    def solutions(self, seeds: Sequence[int]) -> torch.Tensor:
        """[seeds, dimensions]"""
        new = [seed for seed in seeds if seed not in self._solutions]
        if new:
            ends = sample_euler(self.model, noise_of(new), self._sigmas)
            self._solutions |= dict(zip(new, ends, strict=True))
        return torch.stack([self._solutions[seed] for seed in seeds])

    def distances(self, ends: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """[seeds] of end points [seeds, ...]."""
        return (ends.flatten(1) - self.solutions(seeds)).norm(dim=-1)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        seeds = [int(prompt.split()[1]) for prompt in prompts]
        row = tuple((-self.distances(images, seeds)).tolist())
        return Scores(row, (0.0,) * len(row), row)

    def describe(self) -> dict[str, Any]:
        return {"measure": "distance to the mixture's solution"}
