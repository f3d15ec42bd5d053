"""Few-step solvers with a correction hook, in k-diffusion's signature and sigma-space.

Each is ``sample_x(model, x, sigmas, extra_args, callback, disable, *, correction, ...)`` where
``model(x, sigma * ones, **extra_args)`` returns the guided prediction D of the clean latent and
``correction`` is a :class:`~qsched_core.precondition.Correction` or None.  With None, or with
coefficients of exactly 1, each equals ComfyUI's sampler of the same name bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .precondition import Correction

NoiseSampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def default_noise_sampler(x: torch.Tensor, seed: int | None = None) -> NoiseSampler:
    """Fresh unit noise shaped like x at every call, drawn as ComfyUI draws it.

    On the CPU the generator starts at ``seed + 1``: the first draw must not repeat the latent's own
    initial noise, which comes from ``seed``.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(device=x.device)
        generator.manual_seed(seed + 1 if x.device.type == "cpu" else seed)
    return lambda sigma, sigma_next: torch.randn(
        x.size(), dtype=x.dtype, layout=x.layout, device=x.device, generator=generator
    )


@dataclass(frozen=True)
class Step:
    """One corrected model evaluation, handed to a solver's update rule."""

    x: torch.Tensor
    denoised: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor


def _integrate(update, model, x, sigmas, extra_args, callback, correction: Correction | None):
    """Evaluate, correct, update: the loop that every single-evaluation solver shares."""
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    mask = extra_args.get("denoise_mask")
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback(
                {"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised}
            )
        if not torch.isfinite(denoised).all():
            raise ValueError(
                f"the model returned NaN or infinity at step {i + 1} of {len(sigmas) - 1} "
                f"(sigma {float(sigmas[i]):.4g}); try another weight format or a wider compute dtype"
            )
        if correction is not None:
            x, denoised = correction(i, x, denoised, mask)
        x = update(Step(x, denoised, sigmas[i], sigmas[i + 1]))
    return x


@torch.no_grad()
def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, correction=None
) -> torch.Tensor:
    """Euler steps (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn).

    With a correction: x_next = x' + (sigma_next - sigma) * c_eps * eps.  The same update serves
    epsilon, v and flow models, whose difference is in how D is predicted.
    """

    def update(step: Step) -> torch.Tensor:
        derivative = (step.x - step.denoised) / step.sigma
        return step.x + derivative * (step.sigma_next - step.sigma)

    return _integrate(update, model, x, sigmas, extra_args, callback, correction)


def ancestral_step(
    sigma: torch.Tensor, sigma_next: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """(sigma_down, sigma_up) of an ancestral step (k-diffusion, variance exploding)."""
    if not eta:
        return sigma_next, 0.0
    ratio = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    sigma_up = min(sigma_next, eta * ratio**0.5)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


@torch.no_grad()
def sample_euler_ancestral(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    correction=None,
    flow=False,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
) -> torch.Tensor:
    """Euler ancestral, for variance-exploding models and (``flow``) for rectified flow.

    ``eta`` is the share of fresh noise, ``s_noise`` its scale.  The flow form keeps the signal at
    1 - sigma and the noise at sigma, as ComfyUI's ``sample_euler_ancestral_RF``.
    """
    seed = (extra_args or {}).get("seed")
    draw = default_noise_sampler(x, seed) if noise_sampler is None else noise_sampler

    def update_ve(step: Step) -> torch.Tensor:
        down, up = ancestral_step(step.sigma, step.sigma_next, eta)
        if down == 0:
            return step.denoised
        derivative = (step.x - step.denoised) / step.sigma
        moved = step.x + derivative * (down - step.sigma)
        return moved + draw(step.sigma, step.sigma_next) * s_noise * up

    def update_flow(step: Step) -> torch.Tensor:
        if step.sigma_next == 0:
            return step.denoised
        down = step.sigma_next * (1 + (step.sigma_next / step.sigma - 1) * eta)
        alpha_next, alpha_down = 1 - step.sigma_next, 1 - down
        renoise = (step.sigma_next**2 - down**2 * alpha_next**2 / alpha_down**2) ** 0.5
        ratio = down / step.sigma
        moved = ratio * step.x + (1 - ratio) * step.denoised
        if eta > 0:
            noise = draw(step.sigma, step.sigma_next)
            moved = (alpha_next / alpha_down) * moved + noise * s_noise * renoise
        return moved

    update = update_flow if flow else update_ve
    return _integrate(update, model, x, sigmas, extra_args, callback, correction)


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
    (1 - sigma) * D' + sigma * noise.
    """
    seed = (extra_args or {}).get("seed")
    draw = default_noise_sampler(x, seed) if noise_sampler is None else noise_sampler

    def update(step: Step) -> torch.Tensor:
        if not step.sigma_next > 0:
            return step.denoised
        noise = draw(step.sigma, step.sigma_next)
        if s_noise != 1.0:
            noise = noise * s_noise
        if flow:
            return step.sigma_next * noise + (1.0 - step.sigma_next) * step.denoised
        return step.denoised + noise * step.sigma_next

    return _integrate(update, model, x, sigmas, extra_args, callback, correction)


@dataclass(frozen=True)
class Solver:
    """A registry entry: the function, and whether it needs to know the model family or seed."""

    name: str
    function: Callable[..., torch.Tensor]
    stochastic: bool = False

    def options(self, flow: bool) -> dict[str, object]:
        """Keyword arguments that bind the function to a model family."""
        return {"flow": flow} if self.stochastic else {}


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler", sample_euler),
        Solver("euler_ancestral", sample_euler_ancestral, stochastic=True),
        Solver("lcm", sample_lcm, stochastic=True),
    )
}


def get_solver(name: str) -> Solver:
    """The solver called ``name``; ValueError lists the names there are."""
    try:
        return SOLVERS[name]
    except KeyError:
        raise ValueError(
            f"solver={name!r} is unknown; choose one of {', '.join(SOLVERS)}"
        ) from None


def log_snr(sigma: float, flow: bool) -> float:
    """Half the log signal-to-noise ratio at noise level ``sigma``; infinite at its ends."""
    if sigma <= 0:
        return math.inf
    if not flow:
        return -math.log(sigma)
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)
