"""Trajectory consistency sampling with gamma: TCD, PCM, Hyper-SD."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

import torch

from .base import NoiseSampler, Step, Update, k_diffusion, white_noise

_SAME_LEVEL = 1e-4  # relative: neighbouring training sigmas are some 1e-2 to 1e-3 apart


def timestep_of(sigma: float, training: list[float]) -> float:
    """The training timestep whose sigma this is; between two, their interpolation in log sigma.

    ``training`` rises.  A sigma within a relative 1e-4 of a training sigma is that timestep, so
    that a schedule which went through other precision still names whole timesteps.
    """
    after = bisect_right(training, sigma)
    near = [i for i in (after - 1, after) if 0 <= i < len(training)]
    nearest = min(near, key=lambda i: abs(training[i] - sigma))
    if len(near) == 1 or abs(training[nearest] - sigma) <= _SAME_LEVEL * sigma:
        return float(nearest)
    low, high = training[after - 1], training[after]
    if not low > 0:
        return float(after - 1)
    return after - 1 + math.log(sigma / low) / math.log(high / low)


def target_sigma(sigma_next: float, gamma: float, training: list[float]) -> float:
    """Sigma of the timestep s = floor((1 - gamma) * t_next) that TCD goes to before it renoises.

    Never above ``sigma_next``: the variance that is added back would be negative.
    """
    if not gamma:
        return sigma_next
    # the product in float32, as the published scheduler has it: 0.7 * 90 is 63, not 62
    target = torch.tensor(timestep_of(sigma_next, training), dtype=torch.float32) * (1 - gamma)
    return min(training[int(target.floor())], sigma_next)


def tcd(
    draw: NoiseSampler,
    *,
    flow: bool = False,
    training_sigmas: torch.Tensor | None = None,
    gamma: float = 0.3,
    s_noise: float = 1.0,
) -> Update:
    """Strategic stochastic sampling of TCD (arXiv 2402.19159, algorithm 4).

    The step goes to s = floor((1 - gamma) * t_next) without noise, and back up to t_next with it.
    In VP space, where x_vp = x * sqrt(alphabar) and alphabar = 1 / (1 + sigma^2):

        x_s    = sqrt(alphabar_s) * D' + sqrt(1 - alphabar_s) * eps'
        x_next = sqrt(alphabar_next / alphabar_s) * x_s + sqrt(1 - alphabar_next / alphabar_s) * noise

    Divided by sqrt(alphabar_next) that is, exactly,

        x_next = D' + sigma_s * eps' + sqrt(sigma_next^2 - sigma_s^2) * noise

    Timesteps are indices into ``training_sigmas`` [timesteps], rising.  ``gamma`` in [0, 1]: 0 is
    the deterministic step, 1 renoises from (nearly) clean.  The published scheduler ends at
    timestep 0, not at D', and hands the VP state on: so does a step to sigma 0 here, with
    sqrt(alphabar_0) * (D' + sigma_0 * eps'), and with D' where a mask says that pixels are given.

    ``flow`` models have no integer timesteps and the signal is 1 - sigma, the noise sigma: the
    continuous analogue s = (1 - gamma) * sigma_next is ours, not the paper's.  With a = 1 - sigma
    and eps' = (x' - a * D') / sigma:

        x_next = (a_next / a_s) * (a_s * D' + s * eps') + sqrt(sigma_next^2 - (s * a_next / a_s)^2) * noise

    ``s_noise`` scales the fresh noise.  ValueError when an epsilon model's training_sigmas are
    missing or do not rise.
    """
    training = [] if flow else _training(training_sigmas)

    def update_vp(step: Step) -> torch.Tensor:
        sigma, sigma_next = float(step.sigma), float(step.sigma_next)
        if sigma_next == 0:
            end = training[0]
            scale = (1 + end**2) ** -0.5
            moved = (step.x * (scale * end / sigma)).add_(
                step.denoised, alpha=scale * (1 - end / sigma)
            )
            return moved if step.mask is None else torch.lerp(step.denoised, moved, step.mask)
        target = target_sigma(sigma_next, gamma, training)
        return move(step, target / sigma, 1 - target / sigma, sigma_next**2 - target**2)

    def update_flow(step: Step) -> torch.Tensor:
        sigma, sigma_next = float(step.sigma), float(step.sigma_next)
        if sigma_next == 0:
            return step.denoised
        target = (1 - gamma) * sigma_next
        signal = 1 - sigma_next
        kept = target * signal / (1 - target) if target < 1 else target
        return move(
            step, kept / sigma, signal - kept * (1 - sigma) / sigma, sigma_next**2 - kept**2
        )

    def move(step: Step, share_x: float, share_d: float, variance: float) -> torch.Tensor:
        moved = (step.x * share_x).add_(step.denoised, alpha=share_d)
        if variance > 0:
            noise = draw(step.sigma, step.sigma_next)
            moved.add_(noise, alpha=s_noise * variance**0.5)
        return moved

    return update_flow if flow else update_vp


sample_tcd = k_diffusion(tcd, white_noise)


def _training(sigmas: torch.Tensor | None) -> list[float]:
    if sigmas is None:
        raise ValueError(
            "training_sigmas is missing; tcd needs the noise levels that the model was trained at, "
            "one a timestep (a ComfyUI model's model_sampling.sigmas)"
        )
    values = sigmas.tolist()
    if not values or any(a >= b for a, b in pairwise(values)):
        raise ValueError(
            f"training_sigmas ({len(values)} values) must rise from the first timestep to the last"
        )
    return values
