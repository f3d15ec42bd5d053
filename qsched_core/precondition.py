"""The correction of one sampling step: Q-Sched (arXiv 2509.01624), section 3.

With x the noisy latent and D the guided prediction of the clean one, eps = (x - D) / sigma (the
velocity, for flow models), the corrected pair is

    x' = c_x * x
    D' = x' - sigma * c_eps * eps = c_x * x - c_eps * (x - D)

and the base solver makes its step from (x', D').  This module is the only place where (x, D) is
changed; another kind of correction belongs here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Correction(Protocol):
    """What a solver calls after each model evaluation."""

    def __call__(
        self, step: int, x: torch.Tensor, denoised: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrected (x', D') of ``step``; ``mask`` is 1 where the model is responsible."""
        ...

    def intermediate(
        self, step: int, x: torch.Tensor, denoised: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Corrected D' of a further evaluation inside ``step``, at an x made of the corrected x'.

        The state was scaled by the step's c_x already, so only the model's output is corrected:
        D' = x - c_eps * (x - D).
        """
        ...


def precondition(
    x: torch.Tensor,
    denoised: torch.Tensor,
    c_x: float | torch.Tensor,
    c_eps: float | torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected (x', D') of latents x, D [n, ...].

    ``c_x`` and ``c_eps`` are numbers, or tensors that broadcast against x (one value a sample).
    Where ``mask`` (broadcastable, 0 to 1) is 0 the pixels are given and both come back unchanged.
    Numbers that are exactly 1 return the inputs themselves, so the base solver stays bit for bit.
    """
    if isinstance(c_x, float) and isinstance(c_eps, float) and c_x == c_eps == 1.0:
        return x, denoised
    scaled = x * c_x
    if isinstance(c_eps, torch.Tensor):
        corrected = torch.addcmul(scaled, x - denoised, c_eps, value=-1)
    else:
        corrected = torch.add(scaled, x - denoised, alpha=-c_eps)
    if mask is not None:
        return torch.lerp(x, scaled, mask), torch.lerp(denoised, corrected, mask)
    return scaled, corrected


@dataclass(frozen=True)
class ScalarCorrection:
    """Two scalars a step, already matched to the sigmas that are sampled."""

    c_x: tuple[float, ...]
    c_eps: tuple[float, ...]

    def __call__(self, step, x, denoised, mask=None):
        return precondition(x, denoised, self.c_x[step], self.c_eps[step], mask)

    def intermediate(self, step, x, denoised, mask=None):
        return precondition(x, denoised, 1.0, self.c_eps[step], mask)[1]


@dataclass(frozen=True)
class BatchCorrection:
    """Scalars a step that differ between candidates: the batch is [candidates * samples, ...].

    ``c_x`` and ``c_eps`` are [candidates, steps]; samples vary fastest in the batch.
    """

    c_x: torch.Tensor
    c_eps: torch.Tensor

    @classmethod
    def of(cls, corrections: Sequence[ScalarCorrection]) -> BatchCorrection:
        return cls(
            torch.tensor([c.c_x for c in corrections]),
            torch.tensor([c.c_eps for c in corrections]),
        )

    def __call__(self, step, x, denoised, mask=None):
        return precondition(
            x, denoised, _spread(self.c_x[:, step], x), _spread(self.c_eps[:, step], x), mask
        )

    def intermediate(self, step, x, denoised, mask=None):
        return precondition(x, denoised, 1.0, _spread(self.c_eps[:, step], x), mask)[1]


def _spread(column: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value a candidate [candidates] to one a sample, shaped to broadcast against x."""
    per_sample = column.to(x).repeat_interleave(x.shape[0] // len(column))
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))
