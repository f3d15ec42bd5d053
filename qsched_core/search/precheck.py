"""Before the search: how much of the quantization error could two scalars a step remove at all?

The correction changes a step's result to c_x x + (sigma_next - sigma) c_eps eps (Q-Sched,
arXiv 2509.01624, for the Euler update), which is linear in its two scalars: the best ones for a
known reference are a least-squares fit, without a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..prompts import PromptSet
from ..rollout import per_sample_noise
from ..solvers import ModelFacts, get_solver

MIN_PROMPTS, COMPARED_PROMPTS = 2, 8


@dataclass(frozen=True)
class PreCheck:
    """Share of the error's energy that scalars remove, by step and in all; 0 is none, 1 everything.

    Fitted on one half of the prompts and measured on the other, both ways, so a share may be below
    0.  ``error`` is each step's relative error |q - reference| / |reference| of the model's output.
    """

    steps: tuple[float, ...]
    total: float
    error: tuple[float, ...]
    prompts: int
    model_evaluations: int

    @property
    def text(self) -> str:
        each = ", ".join(f"{share:.1%}" for share in self.steps)
        errors = ", ".join(f"{error:.1%}" for error in self.error)
        return (
            f"pre-check: the best two scalars a step remove {self.total:.1%} of the quantization "
            f"error's energy (by step {each}; relative error {errors}), on {self.prompts} prompts "
            f"and {self.model_evaluations} model evaluations"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "total": self.total,
            "error": list(self.error),
            "prompts": self.prompts,
            "model_evaluations": self.model_evaluations,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PreCheck:
        return cls(
            **{**content, "steps": tuple(content["steps"]), "error": tuple(content["error"])}
        )


def precheck(
    latents: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    sigmas: Sequence[float],
    model_evaluations: int | None = None,
) -> PreCheck:
    """Fit the scalars of every step at ``latents``, one [prompts, ...] a step.

    ``quantized`` and ``reference`` are the two models' guided clean latents there; ``sigmas``
    [steps + 1].  A step's target is x + (sigma_next - sigma) eps_reference.
    ``model_evaluations`` is what all this cost; None: one latent a step, prompt and model.
    ValueError where the shapes differ or there are fewer than 2 prompts.
    """
    steps = len(sigmas) - 1
    if not len(latents) == len(quantized) == len(reference) == steps:
        raise ValueError(
            f"{len(latents)} latents, {len(quantized)} and {len(reference)} outputs for {steps} "
            "steps; give one of each a step"
        )
    left, all_energy, shares, errors = 0.0, 0.0, [], []
    for i in range(steps):
        x, q, r = (t[i].double().flatten(1) for t in (latents, quantized, reference))
        if not x.shape == q.shape == r.shape or len(x) < MIN_PROMPTS:
            raise ValueError(
                f"step {i + 1}: latents {list(x.shape)}, outputs {list(q.shape)} and "
                f"{list(r.shape)}; they must be alike, with {MIN_PROMPTS} prompts or more"
            )
        rate = (sigmas[i + 1] - sigmas[i]) / sigmas[i]
        columns = torch.stack([x, rate * (x - q)], dim=2)  # of c_x and c_eps
        target = x + rate * (x - r)
        remaining = _cross_fitted(columns, target)
        energy = float((rate * (q - r)).square().sum())
        shares.append(1 - remaining / energy if energy else 0.0)
        errors.append(float((q - r).norm() / r.norm().clamp(min=1e-30)))
        left, all_energy = left + remaining, all_energy + energy
    total = 1 - left / all_energy if all_energy else 0.0
    count = len(latents[0])
    spent = 2 * steps * count if model_evaluations is None else model_evaluations
    return PreCheck(tuple(shares), total, tuple(errors), count, spent)


@dataclass(frozen=True)
class Observed:
    """A model along a trajectory: noise levels [steps], and latents and predictions at them.

    Tensors [prompts, ...], one a step, on the CPU; predictions are of the guided clean latents.
    ``model_evaluations`` counts every latent that went through the model, kept here or not.
    """

    sigmas: tuple[float, ...]
    latents: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    model_evaluations: int


class Observable(Protocol):
    """A runner whose model can be looked at, see :func:`observed`."""

    max_batch: int

    def observed(self, prompts: PromptSet, at: Observed | None = None) -> Observed: ...


def compared(
    quantized: Observable, reference: Observable, prompts: PromptSet, last_sigma: float
) -> PreCheck:
    """The pre-check of two models on the first prompts, along the reference's trajectory."""
    few = prompts.part(
        0, min(len(prompts), COMPARED_PROMPTS, max(MIN_PROMPTS, quantized.max_batch))
    )
    exact = reference.observed(few)
    ours = quantized.observed(few, exact)
    return precheck(
        exact.latents,
        ours.outputs,
        exact.outputs,
        (*exact.sigmas, last_sigma),
        exact.model_evaluations + ours.model_evaluations,
    )


def observed(
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    solver: str,
    facts: ModelFacts,
    seeds: Sequence[int],
    options: Mapping[str, float] | None = None,
    at: Observed | None = None,
    extra_args: dict | None = None,
) -> Observed:
    """The model at the levels and latents of ``at``, or along its own trajectory from x.

    Of a step with two evaluations the first is taken.  ``seeds`` has one seed a sample: a stochastic
    solver draws for each what it draws for its picture.
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
        entry = get_solver(solver)
        arguments = entry.bind(facts, **(options or {}))
        if entry.stochastic:
            arguments["noise_sampler"] = per_sample_noise(entry, x, sigmas, seeds, candidates=1)
        entry.function(watched, x, sigmas, extra_args=extra_args, **arguments)
    else:
        for level, latents in zip(at.sigmas, at.latents, strict=True):
            watched(latents.to(x), sigmas.new_full((len(x),), level), **(extra_args or {}))
    return Observed(*zip(*(seen[step] for step in sorted(seen)), strict=True), made)


def _cross_fitted(columns: torch.Tensor, target: torch.Tensor) -> float:
    """Squared error left on each half of the prompts by the other half's least-squares fit."""
    halves = (slice(0, None, 2), slice(1, None, 2))
    remaining = 0.0
    for fit, judge in (halves, halves[::-1]):
        matrix, wanted = columns[fit].flatten(0, 1), target[fit].flatten()
        scalars = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
        remaining += float((columns[judge] @ scalars - target[judge]).square().sum())
    return remaining
