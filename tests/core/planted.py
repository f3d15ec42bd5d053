"""Sources for the tests of searches: pictures of one pixel that carry the scores they will get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from qsched_core.objective import Scores
from qsched_core.prompts import PromptSet
from qsched_core.sigmas import divided
from qsched_core.trajectory import Candidate, Observed, Trajectory

TRAJECTORY = Trajectory.of((1.0, 0.9, 0.75, 0.5, 0.0))
_kept: list[Scores] = []  # one score each; a picture's pixel is its place here

Evaluate = Callable[[Sequence[Candidate], PromptSet], Sequence[Scores]]


class Planted:
    """A source whose pictures score what ``evaluate`` says, under :data:`READER`."""

    width = height = 1
    max_batch = 32

    def __init__(
        self,
        evaluate: Evaluate | None = None,
        model: Any = None,
        trajectory: Trajectory = TRAJECTORY,
        observe: Callable | None = None,
    ):
        self.evaluate, self.observe = evaluate, observe
        self.model = {"m": 1} if model is None else model
        self.trajectory, self.nfe = trajectory, 0

    def __call__(self, candidates: Sequence[Candidate], prompts: PromptSet) -> Sequence[Scores]:
        return self.evaluate(candidates, prompts)

    def describe(self) -> dict[str, Any]:
        return {"model": self.model}

    def images(self, prompts, candidates, on_step=None):
        pictures = torch.empty(len(candidates), len(prompts), 1, 1, 3, dtype=torch.float64)
        for k, scores in enumerate(self(candidates, prompts)):
            for i in range(len(prompts)):
                row = (
                    column[i : i + 1] for column in (scores.alignment, scores.quality, scores.jaq)
                )
                terms = {name: values[i : i + 1] for name, values in scores.terms.items()}
                _kept.append(Scores(*row, terms))
                pictures[k, i] = len(_kept) - 1
        return pictures

    def observed(self, prompts, at=None, trajectory=None, on_evaluation=lambda sigma: None):
        """Of ``observe``; without it a model of latents with a clean point for each seed."""
        if self.observe is not None:
            return self.observe(prompts, at)
        sigmas = (trajectory or self.trajectory).sigmas
        clean, noise = (
            torch.stack([_drawn(f"{kind} {seed}") for seed in prompts.seeds])
            for kind in ("clean", "noise")
        )
        x, seen = noise * sigmas[0], []
        levels = pairwise(sigmas)
        if at is not None:
            levels = ((sigma, None) for sigma in at.sigmas)
        for k, (sigma, after) in enumerate(levels):
            x = x if at is None else at.latents[k]
            on_evaluation(sigma)
            denoised = clean * (1 - sigma**2 / 2) + 0.2 * (x - clean) * sigma**3
            seen.append((sigma, x, denoised))
            x = x if after is None else x + (after - sigma) / sigma * (x - denoised)
        self.nfe += len(seen) * len(prompts)
        return Observed(*zip(*seen, strict=True), len(seen) * len(prompts))

    def fine(self, steps):
        own = self.trajectory
        return Trajectory(divided(own.sigmas, steps, own.flow), own.flow)


def _drawn(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919)
    return torch.randn(12, generator=generator, dtype=torch.float64)


class Reader:
    """The measure of planted pictures."""

    def score(self, images, prompts):
        return Scores.join([_kept[int(place)] for place in images[:, 0, 0, 0]])

    def describe(self):
        return {"measure": "planted"}


READER = Reader()
