"""Before the search: how much of the quantization error could the correction remove at all?

Euler's corrected step is linear in the correction's numbers.  So the best numbers for a known
reference are a least-squares fit: no search is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..correction import DEFAULT, Correction
from ..prompts import PromptSet
from ..source import Source

MIN_PROMPTS, COMPARED_PROMPTS = 2, 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreCheck:
    """Share of the error's energy that a correction removes, by step and in all: 0 none, 1 all of it.

    It is fitted on one half of the prompts and measured on the other, both ways.  So a share may be
    below 0.  ``error`` is each step's relative error |q - reference| / |reference| of the model's output.
    """

    steps: tuple[float, ...]
    total: float
    error: tuple[float, ...]
    prompts: int
    nfe: int

    @property
    def text(self) -> str:
        each = ", ".join(f"{share:.1%}" for share in self.steps)
        errors = ", ".join(f"{error:.1%}" for error in self.error)
        return (
            f"pre-check: the best correction of a step removes {self.total:.1%} of the quantization "
            f"error's energy (by step {each}; relative error {errors}), on {self.prompts} prompts "
            f"and {self.nfe} model evaluations (NFE)"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "total": self.total,
            "error": list(self.error),
            "prompts": self.prompts,
            "nfe": self.nfe,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PreCheck:
        nfe = content.get("nfe", content.get("model_evaluations"))  # of older studies
        return cls(
            tuple(content["steps"]),
            content["total"],
            tuple(content["error"]),
            content["prompts"],
            nfe,
        )


def precheck(
    latents: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    sigmas: Sequence[float],
    nfe: int | None = None,
    correction: type[Correction] = DEFAULT,
) -> PreCheck:
    """Fit the numbers of every step at ``latents``, one [prompts, ...] a step.

    ``quantized`` and ``reference`` are the two models' guided clean latents there; ``sigmas``
    [steps + 1].  A step's target is x + (sigma_next - sigma) eps_reference.  ``nfe`` is what all
    this cost; None: one latent a step, prompt and model.  ValueError where the shapes differ or
    there are fewer than 2 prompts.
    """
    if not can_be_fitted(correction):
        raise ValueError(f"a correction of kind {correction.kind!r} has no least-squares fit")
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
        columns = correction.euler_basis(x, q, sigmas[i], sigmas[i + 1])
        target = x + rate * (x - r)
        remaining = _cross_fitted(columns, target)
        energy = float((rate * (q - r)).square().sum())
        shares.append(1 - remaining / energy if energy else 0.0)
        errors.append(float((q - r).norm() / r.norm().clamp(min=1e-30)))
        left, all_energy = left + remaining, all_energy + energy
    total = 1 - left / all_energy if all_energy else 0.0
    count = len(latents[0])
    spent = 2 * steps * count if nfe is None else nfe
    return PreCheck(tuple(shares), total, tuple(errors), count, spent)


def can_be_fitted(correction: type[Correction]) -> bool:
    """Whether Euler's corrected step is linear in the numbers of this kind of correction."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return correction.euler_basis(one, one / 2, 1.0, 0.5) is not None


def compared(
    quantized: Source,
    reference: Source,
    prompts: PromptSet,
    correction: type[Correction] = DEFAULT,
) -> PreCheck | None:
    """The pre-check of two models on the first prompts, along the reference's trajectory.

    None, and nothing is evaluated, for a kind of correction that least squares can't fit.
    """
    if not can_be_fitted(correction):
        logger.info(
            "no pre-check: a correction of kind %s is not linear in its numbers, so its best share "
            "of the error is not known before the search",
            correction.kind,
        )
        return None
    few = prompts.part(
        0, min(len(prompts), COMPARED_PROMPTS, max(MIN_PROMPTS, quantized.max_batch))
    )
    exact = reference.observed(few)
    ours = quantized.observed(few, exact)
    sigmas = (*exact.sigmas, quantized.trajectory.sigmas[-1])
    nfe = exact.nfe + ours.nfe
    return precheck(exact.latents, ours.outputs, exact.outputs, sigmas, nfe, correction)


def _cross_fitted(columns: torch.Tensor, target: torch.Tensor) -> float:
    """Squared error left on each half of the prompts by the other half's least-squares fit."""
    halves = (slice(0, None, 2), slice(1, None, 2))
    remaining = 0.0
    for fit, judge in (halves, halves[::-1]):
        matrix, wanted = columns[fit].flatten(0, 1), target[fit].flatten()
        numbers = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
        remaining += float((columns[judge] @ numbers - target[judge]).square().sum())
    return remaining
