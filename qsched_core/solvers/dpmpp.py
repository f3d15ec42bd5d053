"""DPM-Solver(++): 2M (multistep, for the predicted data or noise) and SDE (two evaluations a step)."""

from __future__ import annotations

import torch

from .base import (
    Multistep,
    NoiseSampler,
    Step,
    Update,
    ancestral_step,
    brownian_noise,
    euler_step,
    k_diffusion,
)


def dpmpp_2m(*, c_1: float = 1.0) -> Update:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with lambda = -log(sigma).

    x_next = (sigma_next / sigma) * x' - (exp(-h) - 1) * ((1 + 1 / 2r) * D' - 1 / 2r * D'_before):
    the history is the previous step's *corrected* prediction, whatever its solver.  As ComfyUI, flow
    models use the same lambda.  ``c_1`` scales what the history adds: 0 is of first order.
    """

    def update(step: Step) -> torch.Tensor:
        now, following = step.sigma.log().neg(), step.sigma_next.log().neg()
        h = following - now
        denoised = step.denoised
        if step.before is not None and step.sigma_next != 0:
            half = c_1 / (2 * ((now - step.before.sigma.log().neg()) / h))
            denoised = ((1 + half) * denoised).sub_(half * step.before.denoised)
        moved = (following.neg().exp() / now.neg().exp()) * step.x
        return moved.sub_((-h).expm1() * denoised)

    return Multistep(update, ("denoised",))


sample_dpmpp_2m = k_diffusion(dpmpp_2m)


def dpm_2m(*, c_1: float = 1.0) -> Update:
    """DPM-Solver(2M), the same for the predicted noise (arXiv 2211.01095, eq. 8, with k = 2).

    x_next = x' + (sigma_next - sigma) * ((1 + 1 / 2r) * eps' - 1 / 2r * eps'_before), with lambda =
    -log(sigma) as in :func:`dpmpp_2m`; r is the ratio of the step before to this one in lambda.
    ``c_1`` as there.
    """

    def update(step: Step) -> torch.Tensor:
        if step.before is None or step.sigma_next == 0:
            return euler_step(step, step.sigma_next)
        h = (step.sigma / step.sigma_next).log()
        half = c_1 / (2 * ((step.before.sigma / step.sigma).log() / h))
        derivative = (step.x - step.denoised).div_(step.sigma).mul_(1 + half)
        derivative.sub_(half * step.before.eps)
        return derivative.mul_(step.sigma_next - step.sigma).add_(step.x)

    return Multistep(update, ("eps",))


sample_dpm_2m = k_diffusion(dpm_2m)


def dpmpp_sde(
    draw: NoiseSampler,
    *,
    flow: bool = False,
    first_sigma: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Update:
    """DPM-Solver++ (stochastic; arXiv 2211.01095, section 5, as k-diffusion's two-stage form).

    ``r`` places the second evaluation between the two noise levels in half-log-SNR.  The step's
    correction moves the state once, at the first evaluation; both outputs are corrected, the second
    at an x that is made of the moved state.  ``flow`` models have lambda = log((1 - sigma) / sigma):
    ``first_sigma`` is :func:`below_one`'s.  Noise is a Brownian path over sigma.  ``eta`` in [0, 1]
    is the share of fresh noise, ``s_noise`` its scale.
    """

    def lambda_of(sigma: torch.Tensor) -> torch.Tensor:
        return sigma.logit().neg() if flow else sigma.log().neg()

    def advance(step: Step, start, end, sigma_end, denoised) -> torch.Tensor:
        """From lambda ``start`` to ``end`` (0-dim) with the prediction ``denoised``."""
        alpha, alpha_end = step.sigma * start.exp(), sigma_end * end.exp()
        down, up = ancestral_step(start.neg().exp(), end.neg().exp(), eta)
        h = down.log().neg() - start
        moved = (alpha_end / alpha) * (-h).exp() * step.x
        moved.sub_(alpha_end * (-h).expm1() * denoised)
        if eta > 0 and s_noise > 0:
            noise = alpha_end * draw(step.sigma, sigma_end)
            moved.add_(noise.mul_(s_noise).mul_(up))
        return moved

    def update(step: Step) -> torch.Tensor:
        if step.sigma_next == 0:
            return step.denoised
        start, end = lambda_of(step.sigma), lambda_of(step.sigma_next)
        middle = start + r * (end - start)
        sigma_middle = middle.neg().sigmoid() if flow else middle.neg().exp()
        second = step.predict(
            advance(step, start, middle, sigma_middle, step.denoised), sigma_middle
        )
        share = 1 / (2 * r)
        mixed = ((1 - share) * step.denoised).add_(share * second)
        return advance(step, start, end, step.sigma_next, mixed)

    return update


def below_one(
    sigmas: torch.Tensor, *, flow: bool = False, first_sigma: float | None = None, **_
) -> torch.Tensor:
    """``sigmas`` with ``first_sigma`` in place of a flow's first sigma of 1, which has no log-SNR.

    ValueError where one is needed and not given.
    """
    if not flow or len(sigmas) < 2 or sigmas[0] < 1:
        return sigmas
    if first_sigma is None:
        raise ValueError(
            f"first_sigma is missing; a flow's first sigma of {float(sigmas[0]):.4g} has no "
            "signal, so dpmpp_sde needs one just below 1 in its place"
        )
    sigmas = sigmas.clone()
    sigmas[0] = first_sigma
    return sigmas


sample_dpmpp_sde = k_diffusion(dpmpp_sde, brownian_noise, below_one)
