"""A correction for a solver that is not ours: only the model's prediction can be changed.

For a step from sigma to sigma_next the prediction becomes

    D'' = x - (x' - D') + k * (x' - x),      k = sigma / (sigma - sigma_next)

Euler's step from (x, D'') ends where Euler's step from the corrected (x', D') ends, so this is exact
for Euler.  At a last step to sigma 0 D'' = D': there it is exact for any solver that returns the
prediction.  For all other solvers and steps it is an approximation.  Evaluations inside a step use
that step's correction and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import Correction


@dataclass(frozen=True)
class AroundCorrection:
    """``correction`` for a trajectory ``sigmas`` [steps + 1] (falling), by sigma."""

    sigmas: tuple[float, ...]
    correction: Correction

    @classmethod
    def of(cls, sigmas: Sequence[float], correction: Correction) -> AroundCorrection:
        return cls(tuple(sigmas), correction)

    def step(self, sigma: float) -> int:
        """The step that an evaluation at ``sigma`` belongs to: the last that starts at or above it."""
        steps = range(len(self.sigmas) - 1)
        # Solvers may lower a first sigma of 1 a little, and round others differently.
        started = [i for i in steps if self.sigmas[i] >= sigma * (1 - 1e-4)]
        return started[-1] if started else 0

    def __call__(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
        """D'' for latents x and the guided prediction D [n, ...] at ``sigma``."""
        step = self.step(sigma)
        moved, corrected = self.correction(step, x, denoised, None)
        if moved is x and corrected is denoised:
            return denoised
        start, end = self.sigmas[step : step + 2]
        return x - (moved - corrected) + start / (start - end) * (moved - x)


class CorrectedModel:
    """``model(x, sigma, ...)`` with corrected predictions; its attributes are the model's.

    ValueError where the model returns NaN or infinity, with the step.
    """

    def __init__(self, model, correction: AroundCorrection):
        self._model, self._correction = model, correction

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        denoised = self._model(x, sigma, *args, **kwargs)
        level = float(sigma.reshape(-1)[0])
        if not torch.isfinite(denoised).all():
            step, steps = self._correction.step(level) + 1, len(self._correction.sigmas) - 1
            raise ValueError(
                f"the model returned NaN or infinity at step {step} of {steps} "
                f"(sigma {level:.4g}); try another weight format or a wider compute dtype"
            )
        return self._correction(x, denoised, level)
