"""Correctors: a step's end once more, with the model's prediction there, for no evaluation more.

That prediction is what the next step needs anyway (UniPC, arXiv 2302.04867, algorithm 1; USF,
arXiv 2312.07243, section 4, has it on or off at every step).  Here it is of second order: the step
is integrated with the line between both predictions.
"""

from __future__ import annotations

import torch

from .base import Before


def of_noise(before: Before, x: torch.Tensor, sigma, denoised: torch.Tensor) -> torch.Tensor:
    """The line is of eps in sigma: x_before + (sigma - sigma_before) * (eps_before + eps) / 2."""
    slope = (x - denoised).div_(sigma)
    slope.add_((before.x - before.denoised).div_(before.sigma))
    return slope.mul_((sigma - before.sigma) / 2).add_(before.x)


def of_data(before: Before, x: torch.Tensor, sigma, denoised: torch.Tensor) -> torch.Tensor:
    """The line is of D in lambda = -log(sigma), with h the step's length there:

    e^-h * x_before + (1 - e^-h) * D_before + (h - 1 + e^-h) * (D - D_before) / h.
    """
    kept = sigma / before.sigma  # e^-h
    share = 1 - (1 - kept) / (before.sigma / sigma).log()
    moved = (denoised - before.denoised).mul_(share)
    return moved.add_(kept * before.x).add_((1 - kept) * before.denoised)
