"""A correction around a solver that is not ours: only the model's answer can be changed.

For a step from sigma to sigma_next the answer is

    D'' = x - c_eps * (x - D) + k * (c_x - 1) * x,      k = sigma / (sigma - sigma_next)

Euler's step from the unscaled (x, D'') ends where it ends from the corrected (x', D') of
:mod:`~qsched_core.precondition`: exact for Euler (and at a last step to sigma 0, where D'' = D', for
any solver that then returns its answer), an approximation for the others.  Evaluations between the
step's ends take the step's coefficients and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .precondition import ScalarCorrection


@dataclass(frozen=True)
class AroundCorrection:
    """Scalars a step for a trajectory ``sigmas`` [steps + 1] (falling), by sigma."""

    sigmas: tuple[float, ...]
    c_x: tuple[float, ...]
    c_eps: tuple[float, ...]

    @classmethod
    def of(cls, sigmas: Sequence[float], correction: ScalarCorrection) -> AroundCorrection:
        return cls(tuple(sigmas), correction.c_x, correction.c_eps)

    def step(self, sigma: float) -> int:
        """The step that an evaluation at ``sigma`` belongs to: the last that starts at or above it."""
        steps = range(len(self.sigmas) - 1)
        # Solvers may lower a first sigma of 1 a little, and compute others in another order.
        started = [i for i in steps if self.sigmas[i] >= sigma * (1 - 1e-4)]
        return started[-1] if started else 0

    def __call__(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
        """D'' for latents x and the guided prediction D [n, ...] at ``sigma``."""
        step = self.step(sigma)
        c_x, c_eps = self.c_x[step], self.c_eps[step]
        if c_x == c_eps == 1.0:
            return denoised
        start, end = self.sigmas[step : step + 2]
        factor = 1 + start / (start - end) * (c_x - 1)
        return factor * x - c_eps * (x - denoised)


class CorrectedModel:
    """``model(x, sigma, ...)`` with its answers corrected; all else is the model's own.

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
