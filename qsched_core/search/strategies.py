"""How the coefficients are searched: a strategy is a row of stages.

A stage has points that are fixed in advance and, after them, points that an Optuna sampler proposes
from the finished trials.  A proposal depends on the seed, its number and those trials alone.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..optional import missing, require
from ..precondition import ScalarCorrection
from .errors import CalibrationError
from .space import Point, RampSpace, Space, StepSpace, grid_points, sobol_points

RAMP_DESIGN = 8  # points spread over the ramp's box before the Gaussian process takes over
RAMP_SHARE = 24 / 64  # of the budget, where steps are refined after the ramp


@dataclass(frozen=True)
class Past:
    """A finished candidate, as later stages see it."""

    correction: ScalarCorrection
    value: float


@dataclass(frozen=True)
class Stage:
    """``trials`` points of ``space``: ``fixed`` first, the rest by the sampler.

    ``history`` are results of earlier stages that the sampler learns from.
    """

    name: str
    space: Space
    trials: int
    fixed: tuple[Point, ...] = ()
    history: tuple[tuple[Point, float], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a strategy needs to know: see ``CalibrationSettings`` for the fields."""

    steps: int
    budget: int
    seed: int
    low: float
    high: float
    radius: float


StageBuilder = Callable[[Plan, Sequence[Past]], Stage]


@dataclass(frozen=True)
class Strategy:
    """A registry entry; budgets count trials beside the first one, which is at c = 1."""

    name: str
    summary: str
    default_budget: int
    min_budget: int
    stages: tuple[StageBuilder, ...]
    packages: tuple[str, ...] = ("optuna",)

    def available(self) -> str | None:
        """Why this strategy can't run here, with the fix, or None."""
        reasons = (missing(name, f"search {self.name!r}", name) for name in self.packages)
        return next(filter(None, reasons), None)

    def budget(self, asked: int) -> int:
        """Trials beside c = 1 for ``asked`` (0: the default); CalibrationError if too few."""
        if asked == 0:
            return self.default_budget
        if asked < self.min_budget:
            raise CalibrationError(
                f"budget={asked} is too small for search {self.name!r}; give at least "
                f"{self.min_budget}, or 0 for its default of {self.default_budget}"
            )
        return asked


def gp_sampler(seed: int, stage: str, number: int):
    """A fresh sampler for trial ``number``: one that lives on has state that a killed run loses.

    The Gaussian process was chosen on noisy quadratics in 8 dimensions (medians of 6): after 40
    trials it has a fifth to a half of the regret that CMA-ES and TPE have, for about 0.3 s a
    proposal on one CPU core.
    """
    optuna = require("optuna", "the search", "optuna")
    digest = hashlib.sha256(f"{seed}/{stage}/{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.GPSampler(
            seed=int.from_bytes(digest[:4], "little"), n_startup_trials=1
        )


def _grid_stage(plan: Plan, past: Sequence[Past]) -> Stage:
    space = RampSpace(plan.steps, plan.low, plan.high)
    points = grid_points(space, math.isqrt(plan.budget))
    points = [p for p in points if any(abs(value - 1) > 1e-9 for value in p.values())]
    return Stage("grid", space, 1 + len(points), (space.identity, *points))


def _ramp_stage(share: float) -> StageBuilder:
    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        space = RampSpace(plan.steps, plan.low, plan.high)
        trials = max(1, round(plan.budget * share))
        design = sobol_points(space, min(RAMP_DESIGN, trials), plan.seed)
        return Stage("ramp", space, 1 + trials, (space.identity, *design))

    return build


def _step_stage(plan: Plan, past: Sequence[Past]) -> Stage:
    best = max(past, key=lambda p: p.value)
    space = StepSpace(best.correction, plan.radius)
    # Of the ramps' results these two do; with all of them, crowded in a plane of the box, the
    # Gaussian process is slower to look elsewhere (tried on quadratics).
    history = tuple((space.point(p.correction), p.value) for p in dict.fromkeys((past[0], best)))
    return Stage("steps", space, plan.budget - (len(past) - 1), (), history)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "gp+steps",
            "Gaussian-process search of the ramp, then of every step's coefficients",
            64,
            4,
            (_ramp_stage(RAMP_SHARE), _step_stage),
            ("optuna", "scipy"),
        ),
        Strategy(
            "gp",
            "Gaussian-process search of the ramp's start values",
            24,
            1,
            (_ramp_stage(1.0),),
            ("optuna", "scipy"),
        ),
        Strategy(
            "grid",
            "the paper's grid of the ramp's start values (the budget's square root a side)",
            100,
            4,
            (_grid_stage,),
        ),
    )
}


def get_strategy(name: str) -> Strategy:
    """CalibrationError, naming the known ones, for an unknown strategy."""
    if name not in STRATEGIES:
        raise CalibrationError(f"search={name!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
