"""Euler: the solver of flow-match Euler, and of ComfyUI's plain sampler."""

from __future__ import annotations

import torch

from .base import euler_step, integrate


@torch.no_grad()
def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, correction=None
) -> torch.Tensor:
    """Euler steps (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn).

    With a correction: x_next = x' + (sigma_next - sigma) * c_eps * eps.  The same update serves
    epsilon, v and flow models, whose difference is in how D is predicted.  x [n, ...] is the noisy
    latent at sigmas[0]; ValueError as :func:`~.base.integrate`.
    """
    return integrate(
        lambda step: euler_step(step, step.sigma_next),
        model, x, sigmas, extra_args, callback, correction,
    )  # fmt: skip
