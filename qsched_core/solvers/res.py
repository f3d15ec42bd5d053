"""RES: a multistep solver that integrates the predicted data exactly in log(sigma)."""

from __future__ import annotations

import torch

from .base import Multistep, Step, Update, euler_step, k_diffusion


def res_multistep(*, c_1: float = 1.0) -> Update:
    """Refined exponential solver, multistep, of order 2 (arXiv 2308.02157), with lambda = -log(sigma).

    x_next = e^-h * x' + (1 - e^-h) * D' + (h - 1 + e^-h) * (D' - D'_before) / h_before: the line through
    both predictions is integrated, where :func:`~.dpmpp.dpmpp_2m` takes its middle.  ``c_1`` scales the last
    term: 0 is Euler's step, as the first and one to sigma 0 are.
    """

    def update(step: Step) -> torch.Tensor:
        if step.before is None or step.sigma_next == 0:
            return euler_step(step, step.sigma_next)
        now, following = step.sigma.log().neg(), step.sigma_next.log().neg()
        h = following - now
        phi_1 = (-h).expm1() / -h
        phi_2 = (phi_1 - 1.0) / -h
        second = c_1 * (phi_2 / ((step.before.sigma.log().neg() - now) / h))
        slope = ((phi_1 - second) * step.denoised).add_(second * step.before.denoised)
        return (h.neg().exp() * step.x).add_(slope.mul_(h))

    return Multistep(update, ("denoised",))


sample_res_multistep = k_diffusion(res_multistep)
