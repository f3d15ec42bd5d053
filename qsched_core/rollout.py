"""Many candidates, one batch: few-step trajectories that share what they can.

The first model evaluation of a trajectory sees the initial noise alone, so it does not depend on
the coefficients: all candidates share it, and a caller may keep it for the next candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .precondition import BatchCorrection, ScalarCorrection
from .solvers import ModelFacts, NoiseSampler, Solver, get_solver


def tile(x: torch.Tensor, times: int) -> torch.Tensor:
    """[n, ...] to [times * n, ...], samples varying fastest."""
    return x.repeat(times, *[1] * (x.ndim - 1))


def per_sample_noise(
    solver: Solver, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int], candidates: int
) -> NoiseSampler:
    """Noise for a batch [candidates * samples, ...] in which every sample has its own seed.

    A sample draws what ``solver`` would draw for it alone, and every candidate gets the same noise.
    """
    draws = [solver.noise(x[i : i + 1], sigmas, seed) for i, seed in enumerate(seeds)]
    return lambda sigma, sigma_next: tile(
        torch.cat([draw(sigma, sigma_next) for draw in draws]), candidates
    )


class SharedFirstStep:
    """Wraps a model for one rollout: the first evaluation is made once for all candidates.

    ``first`` [samples, ...] is that evaluation from an earlier rollout, or None to make it here.
    ``evaluations`` counts latents that really went through the model.
    """

    def __init__(self, model, candidates: int, first: torch.Tensor | None = None):
        self.model, self.candidates, self.first = model, candidates, first
        self.evaluations = 0
        self._started = False

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra_args) -> torch.Tensor:
        if self._started:
            self.evaluations += x.shape[0]
            return self.model(x, sigma, **extra_args)
        self._started = True
        if self.first is None:
            samples = x.shape[0] // self.candidates
            self.first = self.model(x[:samples], sigma[:samples], **extra_args)
            self.evaluations += samples
        return tile(self.first.to(x), self.candidates)


@dataclass(frozen=True)
class Rollout:
    """Final latents [candidates, samples, ...], the shared first evaluation, and the cost."""

    latents: torch.Tensor
    first: torch.Tensor
    evaluations: int


def rollout(
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    corrections: Sequence[ScalarCorrection],
    *,
    solver: str,
    facts: ModelFacts,
    seeds: Sequence[int],
    options: Mapping[str, float] | None = None,
    first: torch.Tensor | None = None,
    extra_args: dict | None = None,
    callback=None,
) -> Rollout:
    """Run every correction on the same initial latents x [samples, ...] in one batch.

    ``model(x, sigma, **extra_args)`` predicts the guided clean latent for any batch that is a
    multiple of the samples, samples varying fastest.  ``seeds`` has one seed a sample, for the
    stochastic solvers; ``options`` are the solver's own.  Each candidate's latents are what it would
    get alone, up to the rounding of a batched model evaluation.
    """
    entry = get_solver(solver)
    candidates = len(corrections)
    shared = SharedFirstStep(model, candidates, first)
    arguments = entry.bind(facts, **(options or {}))
    if entry.stochastic:
        arguments["noise_sampler"] = per_sample_noise(entry, x, sigmas, seeds, candidates)
    out = entry.function(
        shared,
        tile(x, candidates),
        sigmas,
        extra_args=extra_args,
        callback=callback,
        correction=BatchCorrection.of(corrections),
        **arguments,
    )
    return Rollout(out.unflatten(0, (candidates, x.shape[0])), shared.first, shared.evaluations)
