"""Euler: the solver of flow-match Euler, and of ComfyUI's plain sampler."""

from __future__ import annotations

import torch

from .base import Step, Update, euler_step, k_diffusion


def euler() -> Update:
    """x_next = x' + (sigma_next - sigma) * eps' (Karras et al. 2022, arXiv 2206.00364, algorithm 2
    without churn).

    The same update serves epsilon, v and flow models, whose difference is in how D is predicted.
    """

    def update(step: Step) -> torch.Tensor:
        return euler_step(step, step.sigma_next)

    return update


sample_euler = k_diffusion(euler)
