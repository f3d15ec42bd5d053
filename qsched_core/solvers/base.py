"""What every solver shares: the evaluated and corrected step, its loop, the noise, the checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ..correction.base import StepCorrection
from ..optional import require

NoiseSampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NoiseSource = Callable[[torch.Tensor, torch.Tensor, "int | None"], NoiseSampler]


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


def white_noise(x: torch.Tensor, sigmas: torch.Tensor, seed: int | None) -> NoiseSampler:
    """Independent draws, whatever the noise levels: :func:`default_noise_sampler`."""
    return default_noise_sampler(x, seed)


def brownian_noise(x: torch.Tensor, sigmas: torch.Tensor, seed: int | None) -> NoiseSampler:
    """Unit increments of one Brownian path over sigma, shaped like x, as ComfyUI draws them.

    The path lives on the CPU between the smallest sigma above 0 and the largest, and depends on the
    seed and the shape alone; draws over overlapping intervals are correlated as they must be.
    MissingDependencyError without torchsde (ComfyUI brings it).
    """
    torchsde = require("torchsde", "the solver dpmpp_sde", "torchsde")
    tree = None

    def draw(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        nonlocal tree
        if tree is None:  # a single step to sigma 0 draws nothing, and has no interval
            tree = torchsde.BrownianTree(
                sigmas[sigmas > 0].min().detach().cpu(),
                torch.zeros_like(x, device="cpu"),
                sigmas.max().detach().cpu(),
                entropy=int(torch.randint(0, 2**63 - 1, ())) if seed is None else seed,
            )
        late, early = sigma_next.detach().cpu().float(), sigma.detach().cpu().float()
        increment = tree(late, early).to(device=sigma.device, dtype=sigma.dtype)
        # sigma falls along the trajectory: the path is run from its end, hence the sign
        return -increment / (sigma_next - sigma).abs().sqrt()

    return draw


def noise_of(
    source: NoiseSource, given: NoiseSampler | None, x, sigmas, extra_args: dict | None
) -> NoiseSampler:
    """The caller's noise sampler, or ``source``'s for the seed in ``extra_args``."""
    return source(x, sigmas, (extra_args or {}).get("seed")) if given is None else given


def check_sigmas(sigmas: torch.Tensor) -> None:
    """ValueError unless ``sigmas`` [steps + 1] has a step, is finite, not negative, and falls."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas has shape {list(sigmas.shape)}; at least 2 values in a row are needed for one step"
        )
    values = sigmas.tolist()
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"sigmas={values} must be finite and not negative")
    if not all(a > b for a, b in pairwise(values)):
        raise ValueError(f"sigmas={values} must decrease at every step")


def is_finite(x: torch.Tensor) -> bool:
    """Whether x has neither NaN nor infinity, normally in one reduction.

    A sum is finite unless a term is not, or the sum itself overflows: only then each value is seen.
    """
    narrow = x.dtype.itemsize < 4
    total = x.sum(dtype=torch.float32) if narrow else x.sum()
    return math.isfinite(total) or bool(torch.isfinite(x).all())


def check_latent(x: torch.Tensor) -> None:
    """ValueError for an initial latent x that is empty or not finite."""
    if not x.numel():
        raise ValueError(f"the latent is empty (shape {list(x.shape)}); give it a width and height")
    if not is_finite(x):
        raise ValueError(
            "the latent has NaN or infinity before step 1; look at the node it comes from (a VAE in "
            "half precision is the usual cause), or start from an empty latent"
        )


class Before(NamedTuple):
    """The step before: its sigma, and what the updates of the run ask for of it (else None).

    ``x`` and ``denoised`` are its x' and D', ``eps`` its (x' - D') / sigma.
    """

    sigma: torch.Tensor
    x: torch.Tensor | None
    denoised: torch.Tensor | None
    eps: torch.Tensor | None


class Step(NamedTuple):
    """One corrected model evaluation, handed to a solver's update rule.

    ``x`` and ``denoised`` [n, ...] are x' and D'; they may be the model's or the caller's own
    tensors, so an update never writes to them.  ``predict(x, sigma)`` evaluates the model again
    inside the step and gives its corrected D' there.  ``mask`` is 0 where pixels are given.
    ``before`` is the step before, whatever its solver; None at the first, and where nothing asks.
    """

    x: torch.Tensor
    denoised: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    mask: torch.Tensor | None
    before: Before | None = None


# gives the latent at sigma_next; this is what one solver has of its own
Update = Callable[[Step], torch.Tensor]


class Multistep(NamedTuple):
    """An update that looks at the step before: ``asks`` names the fields of :class:`Before`."""

    update: Update
    asks: tuple[str, ...]

    def __call__(self, step: Step) -> torch.Tensor:
        return self.update(step)


# from the step before, and x, sigma and the prediction D at its end: another x there
Corrector = Callable[[Before, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Corrected(NamedTuple):
    """An update whose end is computed again when the model has been evaluated there.

    ``share`` in [0, 1]: how much of the way from the update's own end to the ``corrector``'s.
    """

    update: Update
    corrector: Corrector
    share: float

    @property
    def asks(self) -> tuple[str, ...]:
        return ("x", "denoised", *getattr(self.update, "asks", ()))

    def __call__(self, step: Step) -> torch.Tensor:
        return self.update(step)

    def end(self, before: Before, x, sigma, denoised) -> torch.Tensor:
        """The end x [n, ...] at ``sigma``, with what the model predicts there."""
        again = self.corrector(before, x, sigma, denoised)
        return again if self.share == 1 else again.sub_(x).mul_(self.share).add_(x)


def integrate(
    update: Update | Sequence[Update],
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None,
    callback,
    correction: StepCorrection | None,
) -> torch.Tensor:
    """Evaluate, correct, update: the loop of every solver, from x [n, ...] at sigmas[0].

    ``update`` is one for all steps, or a list with one for each.  The end of a
    :class:`Corrected` one is computed again before the correction of the next step is applied.
    ValueError for sigmas or a latent that cannot be sampled, and with the step's number when the model
    returns NaN or infinity.
    """
    check_sigmas(sigmas)
    check_latent(x)
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    mask = extra_args.get("denoise_mask")
    steps = len(sigmas) - 1
    updates = [update] * steps if callable(update) else update
    asked = {name for each in updates for name in getattr(each, "asks", ())}
    before = None

    def evaluate(i: int, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = model(x, sigma * ones, **extra_args)
        if not is_finite(denoised):
            raise ValueError(
                f"the model returned NaN or infinity at step {i + 1} of {steps} "
                f"(sigma {float(sigma):.4g}); try another weight format or a wider compute dtype"
            )
        return denoised

    for i in range(steps):
        sigma = sigmas[i]
        denoised = evaluate(i, x, sigma)
        if before is not None and isinstance(updates[i - 1], Corrected):
            x = updates[i - 1].end(before, x, sigma, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})

        def predict(x, sigma, i=i):
            denoised = evaluate(i, x, sigma)
            return denoised if correction is None else correction.intermediate(i, x, denoised, mask)

        if correction is not None:
            x, denoised = correction(i, x, denoised, mask)
        seen = None
        if asked and i + 1 < steps:
            seen = Before(
                sigma,
                x if "x" in asked else None,
                denoised if "denoised" in asked else None,
                (x - denoised).div_(sigma) if "eps" in asked else None,
            )
        x = updates[i](Step(x, denoised, sigma, sigmas[i + 1], predict, mask, before))
        before = seen
    return x


def k_diffusion(
    make: Callable[..., Update],
    noise: NoiseSource | None = None,
    prepare: Callable[..., torch.Tensor] | None = None,
) -> Callable[..., torch.Tensor]:
    """The solver of ``make`` as a function with k-diffusion's signature.

    ``noise`` is what a stochastic one draws from (its seed is extra_args["seed"], or the caller
    gives a ``noise_sampler``); ``prepare`` changes the sigmas first.
    """

    @torch.no_grad()
    def sample(
        model,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict | None = None,
        callback=None,
        disable=None,
        *,
        correction: StepCorrection | None = None,
        noise_sampler: NoiseSampler | None = None,
        **settings,
    ) -> torch.Tensor:
        draws = []
        if noise is not None:
            draws.append(noise_of(noise, noise_sampler, x, sigmas, extra_args))
        if prepare is not None:
            sigmas = prepare(sigmas, **settings)
        return integrate(
            make(*draws, **settings), model, x, sigmas, extra_args, callback, correction
        )

    sample.__name__ = sample.__qualname__ = f"sample_{make.__name__}"
    sample.__doc__ = f"{make.__doc__}\n    x [n, ...] at sigmas[0]; ValueError as integrate.\n    "
    return sample


def ancestral_step(
    sigma: torch.Tensor, sigma_next: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """(sigma_down, sigma_up) of an ancestral step (k-diffusion, variance exploding).

    sigma_up = eta * sigma_next * sqrt(1 - (sigma_next / sigma)^2), and the two add up to sigma_next
    in variance: DDIM's sigma of arXiv 2010.02502, eq. 16, divided by sqrt(alphabar_next).
    """
    if not eta:
        return sigma_next, 0.0
    ratio = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    sigma_up = min(sigma_next, eta * ratio**0.5)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


def euler_step(step: Step, sigma_to: torch.Tensor) -> torch.Tensor:
    """x' + (sigma_to - sigma) * eps', in one new tensor."""
    derivative = step.x - step.denoised
    return derivative.div_(step.sigma).mul_(sigma_to - step.sigma).add_(step.x)
