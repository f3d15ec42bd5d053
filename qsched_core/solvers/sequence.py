"""A trajectory in which every step may have another solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ..correction.base import StepCorrection
from .base import Corrected, NoiseSampler, NoiseSource, Update, integrate
from .registry import CORRECTOR, Solver

Noise = Callable[[NoiseSource], NoiseSampler]


@dataclass(frozen=True)
class BoundSolver:
    """A solver with the model's properties and its options filled in."""

    solver: Solver
    settings: Mapping[str, Any]

    def update(self, noise: Noise) -> Update:
        """The update of one step."""
        draws = () if self.solver.noise is None else (noise(self.solver.noise),)
        settings = dict(self.settings)
        share = settings.pop(CORRECTOR, 0.0)
        made = self.solver.make(*draws, **settings)
        return Corrected(made, self.solver.corrector, share) if share else made


@torch.no_grad()
def sample_steps(
    steps: Sequence[BoundSolver],
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None = None,
    callback=None,
    *,
    correction: StepCorrection | None = None,
    noise: Noise | None = None,
) -> torch.Tensor:
    """The latent [n, ...] at the last of ``sigmas`` from x at the first, each step by its solver.

    With one solver this equals that solver's own function, bit for bit.  A multistep solver goes on from
    the prediction of the step before, whatever its solver (USF, arXiv 2312.07243, section 4: solver,
    order and prediction are chosen anew at every step).  ``noise`` gives the sampler of a noise source (by default for the seed in
    ``extra_args``); steps that draw from the same source share one, so that no noise comes twice.
    ValueError as :func:`~.base.integrate`, and where there is not one solver a step.
    """
    if len(steps) != len(sigmas) - 1:
        raise ValueError(f"{len(steps)} solvers for {len(sigmas) - 1} steps; give one a step")
    start = sigmas
    if steps[0].solver.prepare is not None:
        start = steps[0].solver.prepare(sigmas, **steps[0].settings)
    samplers: dict[NoiseSource, NoiseSampler] = {}

    def shared(source: NoiseSource) -> NoiseSampler:
        if source not in samplers:
            seed = (extra_args or {}).get("seed")
            samplers[source] = source(x, sigmas, seed) if noise is None else noise(source)
        return samplers[source]

    updates: list[Update] = []
    for bound, same in groupby(steps):
        updates += [bound.update(shared)] * len(list(same))
    return integrate(updates, model, x, start, extra_args, callback, correction)
