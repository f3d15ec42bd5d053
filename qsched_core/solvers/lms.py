"""Linear multistep in sigma, of order 2: Adams and Bashforth's method for steps of any length."""

from __future__ import annotations

import torch

from .base import Multistep, Step, Update, euler_step, k_diffusion


def lms_2(*, c_1: float = 1.0) -> Update:
    """x_next = x' + (sigma_next - sigma) * ((1 + r / 2) * eps' - r / 2 * eps'_before), r being the ratio
    of this step to the one before (k-diffusion's sample_lms of order 2).

    The first step is Euler's.  The step to sigma 0 is of second order too, which log-SNR solvers
    can't be.  ``c_1`` scales what the step before adds: 0 is Euler's.
    """

    def update(step: Step) -> torch.Tensor:
        if step.before is None:
            return euler_step(step, step.sigma_next)
        length = step.sigma_next - step.sigma
        half = c_1 * length / (2 * (step.sigma - step.before.sigma))
        derivative = (step.x - step.denoised).div_(step.sigma).mul_(1 + half)
        derivative.sub_(half * step.before.eps)
        return derivative.mul_(length).add_(step.x)

    return Multistep(update, ("eps",))


sample_lms_2 = k_diffusion(lms_2)
