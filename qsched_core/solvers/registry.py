"""The table of solvers: what each needs of the model, and the options a user may set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from ..text import shown
from .ancestral import euler_ancestral
from .base import Corrector, NoiseSource, Update, brownian_noise, k_diffusion, white_noise
from .correctors import of_data, of_noise
from .ddim import ddim
from .dpmpp import below_one, dpm_2m, dpmpp_2m, dpmpp_sde
from .euler import euler
from .lcm import lcm
from .lms import lms_2
from .res import res_multistep
from .tcd import tcd


@dataclass(frozen=True)
class Option:
    """A number of a solver: its range includes both ends."""

    name: str
    default: float
    minimum: float
    maximum: float
    tooltip: str

    def __post_init__(self):
        self.check(self.default, "the registry")

    def check(self, value: object, solver: str) -> float:
        """``value`` as a float; ValueError naming option, value and range if it is not in it."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not self.minimum <= value <= self.maximum:
            raise ValueError(
                f"{self.name}={shown(value)} for solver {solver} must be a number from {self.minimum:g} "
                f"to {self.maximum:g}; its default is {self.default:g}"
            )
        return float(value)


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """What solvers may need to know of a model.

    ``flow``: sigma is a flow's time in [0, 1].  ``s_noise``: the scale of the noise the model was
    trained with.  ``training_sigmas`` [timesteps]: rising, one a training timestep, None if it has
    none.  ``first_sigma``: stands for a flow's sigma of 1 where that has no log-SNR.
    """

    flow: bool
    s_noise: float = 1.0
    training_sigmas: torch.Tensor | None = None
    first_sigma: float | None = None


@dataclass(frozen=True)
class Solver:
    """A registry entry.

    ``make`` gives an update; one that looks at the step before is a Multistep.
    ``noise`` makes the noise sampler of a stochastic solver from (x, sigmas, seed); None for the
    others.  ``needs`` are the fields of :class:`ModelInfo` that ``make`` takes as keywords,
    ``options`` what a user may set, ``learned`` what a search alone sets, step by step.  ``prepare`` changes the sigmas of a trajectory that begins
    with this solver.  ``corrector`` computes its steps' ends again, where the option of that name says
    so.  ``extrapolates``: its step to sigma 0 is more than the prediction.
    ``new_inpaint_noise``: ComfyUI gives the known pixels of an inpainting their own noise with this
    sampler.
    """

    make: Callable[..., Update]
    noise: NoiseSource | None = None
    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()
    prepare: Callable[..., torch.Tensor] | None = None
    new_inpaint_noise: bool = False
    corrector: Corrector | None = None
    extrapolates: bool = False
    learned: tuple[Option, ...] = ()

    def __post_init__(self):
        unknown = set(self.needs) - {field.name for field in fields(ModelInfo)}
        if unknown:
            raise ValueError(f"needs={self.needs} of solver {self.name}: no {', '.join(unknown)}")

    @property
    def name(self) -> str:
        return self.make.__name__

    @cached_property
    def function(self) -> Callable[..., torch.Tensor]:
        """The solver alone, with k-diffusion's signature."""
        return k_diffusion(self.make, self.noise, self.prepare)

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise after the first latent's, so that the seed matters to it."""
        return self.noise is not None

    def check(self, options: dict[str, object]) -> dict[str, float]:
        """Every option, validated, defaults filled in; ValueError for one that is not there.

        Options that are learned are there only where they are given.
        """
        known = {option.name: option for option in (*self.options, *self.learned)}
        for name, value in options.items():
            if name not in known:
                there = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(
                    f"{name}={shown(value)} is no option of solver {self.name}; {there}"
                )
        return {
            name: option.check(options.get(name, option.default), self.name)
            for name, option in known.items()
            if name in options or option in self.options
        }

    def bind(self, model: ModelInfo, **options: object) -> dict[str, object]:
        """Keyword arguments that fit ``make`` to a model, with validated ``options``."""
        return {name: getattr(model, name) for name in self.needs} | self.check(options)


def _share(name: str, default: float, tooltip: str) -> Option:
    return Option(name, default, 0.0, 1.0, tooltip)


_ETA = "Share of fresh noise in every step. 0 is deterministic"

CORRECTOR, SECOND_ORDER = "corrector", "c_1"  # options that a search over solvers learns
_CORRECTOR = _share(CORRECTOR, 0.0, "How much of the corrector's end of a step is taken.")
_SECOND_ORDER = Option(SECOND_ORDER, 1.0, 0.0, 2.0, "Times what the step before adds.")
_TWO_STEPS = (_CORRECTOR, _SECOND_ORDER)

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(euler, learned=(_CORRECTOR,), corrector=of_noise),
        Solver(
            euler_ancestral,
            white_noise,
            (_share("eta", 1.0, f"{_ETA}, 1 is ComfyUI's default."),),
            ("flow", "s_noise"),
        ),
        Solver(lcm, white_noise, needs=("flow", "s_noise")),
        Solver(
            tcd,
            white_noise,
            (
                _share(
                    "gamma",
                    0.3,
                    "Randomness of TCD, PCM and Hyper-SD models. 0 is deterministic, 1 renoises "
                    "fully; 0.3 is the published default. More steps want more of it.",
                ),
            ),
            ("flow", "s_noise", "training_sigmas"),
        ),
        Solver(
            ddim,
            white_noise,
            (_share("eta", 0.0, f"{_ETA} (ComfyUI's ddim), 1 is as random as DDPM."),),
            ("flow", "s_noise"),
            new_inpaint_noise=True,
        ),
        Solver(dpmpp_2m, learned=_TWO_STEPS, corrector=of_data),
        Solver(
            dpmpp_sde,
            brownian_noise,
            (_share("eta", 1.0, f"{_ETA}, 1 is ComfyUI's default."),),
            ("flow", "s_noise", "first_sigma"),
            prepare=below_one,
        ),
        Solver(dpm_2m, learned=_TWO_STEPS, corrector=of_noise),
        Solver(res_multistep, learned=_TWO_STEPS, corrector=of_data),
        Solver(lms_2, learned=_TWO_STEPS, corrector=of_noise, extrapolates=True),
    )
}


def get_solver(name: str) -> Solver:
    """The solver called ``name``; ValueError lists the names there are."""
    try:
        return SOLVERS[name]
    except KeyError:
        raise ValueError(
            f"solver={shown(name)} is unknown; choose one of {', '.join(SOLVERS)}"
        ) from None
