"""Latent consistency sampling: LCM, LCM-LoRA, Lightning-type models."""

from __future__ import annotations

import torch

from .base import Step, integrate, noise_of, white_noise


@torch.no_grad()
def sample_lcm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    correction=None,
    flow=False,
    s_noise=1.0,
    noise_sampler=None,
) -> torch.Tensor:
    """Latent consistency sampling (arXiv 2310.04378, algorithm 3): jump to D', then renoise.

    The noise at sigma_next is added as the model family mixes it: D' + sigma * noise, or for flow
    (1 - sigma) * D' + sigma * noise.  ``s_noise`` scales it.  x [n, ...]; ValueError as
    :func:`~.base.integrate`.
    """
    draw = noise_of(white_noise, noise_sampler, x, sigmas, extra_args)

    def update(step: Step) -> torch.Tensor:
        if not step.sigma_next > 0:
            return step.denoised
        noise = draw(step.sigma, step.sigma_next)
        if s_noise != 1.0:
            noise = noise * s_noise
        noise = noise * step.sigma_next
        return noise.add_((1.0 - step.sigma_next) * step.denoised if flow else step.denoised)

    return integrate(update, model, x, sigmas, extra_args, callback, correction)
