"""Euler ancestral: the solver of SDXL-Turbo and its kind."""

from __future__ import annotations

import torch

from .base import NoiseSampler, Step, Update, ancestral_step, euler_step, k_diffusion, white_noise


def euler_ancestral(
    draw: NoiseSampler, *, flow: bool = False, eta: float = 1.0, s_noise: float = 1.0
) -> Update:
    """Euler ancestral, for variance-exploding models and (``flow``) for rectified flow.

    x_next = x' + (sigma_down - sigma) * eps' + sigma_up * noise (k-diffusion; Karras et al. 2022,
    arXiv 2206.00364, algorithm 2 with the noise after the step).  ``eta`` in [0, 1] is the share of
    fresh noise, ``s_noise`` its scale.  The flow form keeps the signal at 1 - sigma and the noise at
    sigma, as ComfyUI's ``sample_euler_ancestral_RF``.
    """

    def update_ve(step: Step) -> torch.Tensor:
        down, up = ancestral_step(step.sigma, step.sigma_next, eta)
        if down == 0:
            return step.denoised
        # drawn at eta 0 too, as in ComfyUI: later draws of the same generator must not shift
        noise = draw(step.sigma, step.sigma_next) * s_noise
        return euler_step(step, down).add_(noise.mul_(up))

    def update_flow(step: Step) -> torch.Tensor:
        if step.sigma_next == 0:
            return step.denoised
        down = step.sigma_next * (1 + (step.sigma_next / step.sigma - 1) * eta)
        alpha_next, alpha_down = 1 - step.sigma_next, 1 - down
        renoise = (step.sigma_next**2 - down**2 * alpha_next**2 / alpha_down**2) ** 0.5
        ratio = down / step.sigma
        moved = (ratio * step.x).add_((1 - ratio) * step.denoised)
        if eta > 0:
            noise = draw(step.sigma, step.sigma_next) * s_noise
            moved.mul_(alpha_next / alpha_down).add_(noise.mul_(renoise))
        return moved

    return update_flow if flow else update_ve


sample_euler_ancestral = k_diffusion(euler_ancestral, white_noise)
