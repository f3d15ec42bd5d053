"""DDIM with eta, in sigma-space."""

from __future__ import annotations

import torch

from .base import NoiseSampler, Step, Update, ancestral_step, euler_step, k_diffusion, white_noise


def ddim(
    draw: NoiseSampler, *, flow: bool = False, eta: float = 0.0, s_noise: float = 1.0
) -> Update:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); at ``eta`` 0 Euler's step, bit for bit.

    Eq. 12 divided by sqrt(alphabar_next), with sigma = sqrt(1 / alphabar - 1), is

        x_next = D' + sqrt(sigma_next^2 - up^2) * eps' + up * noise
        up = eta * sigma_next * sqrt(1 - (sigma_next / sigma)^2)                          (eq. 16)

    ``flow`` models have the signal 1 - sigma: there sigma / (1 - sigma) stands for sigma in up's
    root, eps' = (x' - (1 - sigma) * D') / sigma is the noise that was predicted, and D' is scaled
    by 1 - sigma_next.  ``eta`` is in [0, 1]; ``s_noise`` scales the fresh noise.
    """

    def update_ve(step: Step) -> torch.Tensor:
        down, up = ancestral_step(step.sigma, step.sigma_next, eta)
        moved = euler_step(step, down)
        return moved.add_(draw(step.sigma, step.sigma_next) * (s_noise * up)) if up else moved

    def update_flow(step: Step) -> torch.Tensor:
        sigma, sigma_next = step.sigma, step.sigma_next
        if not eta or sigma_next == 0:
            return euler_step(step, sigma_next)
        alpha, alpha_next = 1 - sigma, 1 - sigma_next
        kept = (sigma_next * alpha) / (sigma * alpha_next)
        up = eta * sigma_next * (1 - kept**2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        moved = (step.x * (down / sigma)).add_(step.denoised * (alpha_next - down * alpha / sigma))
        return moved.add_(draw(sigma, sigma_next) * (s_noise * up))

    return update_flow if flow else update_ve


sample_ddim = k_diffusion(ddim, white_noise)
