"""Latent consistency sampling: LCM, LCM-LoRA, Lightning-type models."""

from __future__ import annotations

import torch

from .base import NoiseSampler, Step, Update, k_diffusion, white_noise


def lcm(draw: NoiseSampler, *, flow: bool = False, s_noise: float = 1.0) -> Update:
    """Latent consistency sampling (arXiv 2310.04378, algorithm 3): jump to D', then renoise.

    The noise at sigma_next is added as the model family mixes it: D' + sigma * noise, or for flow
    (1 - sigma) * D' + sigma * noise.  ``s_noise`` scales it.
    """

    def update(step: Step) -> torch.Tensor:
        if not step.sigma_next > 0:
            return step.denoised
        noise = draw(step.sigma, step.sigma_next)
        if s_noise != 1.0:
            noise = noise * s_noise
        noise = noise * step.sigma_next
        return noise.add_((1.0 - step.sigma_next) * step.denoised if flow else step.denoised)

    return update


sample_lcm = k_diffusion(lcm, white_noise)
