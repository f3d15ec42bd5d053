"""What is searched: boxes of named numbers, each point of which is a candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch

from ..correction.scalar import MAX_COEFFICIENT, MIN_COEFFICIENT, ScalarCorrection
from ..sigmas import log_snr, sigma_of
from ..solvers.registry import CORRECTOR, SECOND_ORDER
from ..study.errors import CalibrationError
from ..study.store import Point, Range, choices_of
from ..text import shown
from ..trajectory import Candidate, StepSolver, Trajectory


class Space(Protocol):
    """A box; ``start`` is a point that is known to be good."""

    @property
    def bounds(self) -> dict[str, Range]: ...

    @property
    def start(self) -> dict[str, float]: ...

    def candidate(self, point: Point) -> Candidate:
        """The candidate at ``point``."""
        ...


def check_range(low: float, high: float) -> None:
    """CalibrationError unless low <= 1 <= high are coefficients a schedule may have."""
    if not MIN_COEFFICIENT <= low < high <= MAX_COEFFICIENT:
        raise CalibrationError(
            f"low={shown(low)}, high={shown(high)} must be low < high within "
            f"[{MIN_COEFFICIENT}, {MAX_COEFFICIENT}]"
        )
    if not low <= 1 <= high:
        raise CalibrationError(
            f"low={shown(low)}, high={shown(high)} must have 1, the base solver, between them"
        )


def check_radius(radius: float) -> None:
    """CalibrationError unless the radius is a finite number above 0."""
    if not 0 < radius < math.inf:
        raise CalibrationError(f"radius={shown(radius)} must be above 0, e.g. 0.1")


@dataclass(frozen=True)
class RampSpace:
    """The paper's two numbers: start of c_x and of c_eps, each running linearly to 1.

    With ``ends`` the values they run to are free as well.
    """

    trajectory: Trajectory
    low: float = 0.8
    high: float = 1.2
    ends: bool = False

    def __post_init__(self):
        check_range(self.low, self.high)

    @property
    def bounds(self):
        names = ["c_x start", "c_eps start"]
        if self.ends and self.trajectory.steps > 1:
            names += ["c_x end", "c_eps end"]
        return dict.fromkeys(names, (self.low, self.high))

    @property
    def start(self):
        return dict.fromkeys(self.bounds, 1.0)

    def candidate(self, point):
        ends = {
            name: (point[f"{name} start"], point.get(f"{name} end", 1.0))
            for name in ("c_x", "c_eps")
        }
        correction = ScalarCorrection.ramp(ends, self.trajectory.steps)
        return Candidate(self.trajectory, correction)


@dataclass(frozen=True)
class StepSpace:
    """Two free numbers a step, from ``radius`` below to ``radius`` above the range of ``centre`` and 1.

    ``free`` names the steps that are searched (all by default); the others stay at the centre.
    """

    centre: Candidate
    radius: float = 0.1
    free: tuple[int, ...] | None = None

    def __post_init__(self):
        check_radius(self.radius)

    @property
    def bounds(self):
        def around(value: float) -> Range:
            return (
                max(MIN_COEFFICIENT, min(1.0, value) - self.radius),
                min(MAX_COEFFICIENT, max(1.0, value) + self.radius),
            )

        return {name: around(value) for name, value in self.point(self.centre).items()}

    @property
    def start(self):
        return self.point(self.centre)

    def point(self, candidate: Candidate) -> dict[str, float]:
        """The point whose correction this is."""
        steps = range(candidate.correction.steps) if self.free is None else self.free
        rows = candidate.correction.rows()
        return {f"{name}[{i}]": values[i] for name, values in rows.items() for i in steps}

    def candidate(self, point):
        correction = self.centre.correction
        rows = {
            name: tuple(point.get(f"{name}[{i}]", kept) for i, kept in enumerate(values))
            for name, values in correction.rows().items()
        }
        return Candidate(self.centre.trajectory, correction.with_rows(rows))


@dataclass(frozen=True)
class LevelSpace:
    """The inner noise levels of ``centre`` by their gaps in log-SNR, and a ramp times its numbers.

    AutoDiffusion (arXiv 2309.10438) searches which timesteps; here "level" moves the first inner
    level, and all behind it, by up to 1 in half the log-SNR, and each "gap" halves to doubles the way
    to the next one.  First and last level stay; inner ones stay above ``lowest``, the smallest that
    the model knows, and apart.  The middle of the box is the centre itself.
    """

    centre: Candidate
    lowest: float
    low: float = 0.8
    high: float = 1.2
    ends: bool = False

    APART: ClassVar[float] = 0.01  # in half the log-SNR

    def __post_init__(self):
        check_range(self.low, self.high)

    @property
    def _ramp(self) -> RampSpace:
        return RampSpace(self.centre.trajectory, self.low, self.high, self.ends)

    @property
    def _inner(self) -> list[float]:
        """Half the log-SNR of the inner levels, rising."""
        trajectory = self.centre.trajectory
        return [log_snr(sigma, trajectory.flow) for sigma in trajectory.sigmas[1:-1]]

    @property
    def bounds(self):
        inner = len(self._inner)
        names = ["level"] * (inner > 0) + [f"gap {i}" for i in range(2, inner + 1)]
        return dict.fromkeys(names, (-1.0, 1.0)) | self._ramp.bounds

    @property
    def start(self):
        return dict.fromkeys(self.bounds, 0.0) | self._ramp.start

    def candidate(self, point):
        if point == self.start:
            return self.centre
        ramp = self._ramp.candidate(point).correction.rows()
        rows = {
            name: tuple(
                min(max(value * by, MIN_COEFFICIENT), MAX_COEFFICIENT)
                for value, by in zip(values, ramp[name], strict=True)
            )
            for name, values in self.centre.correction.rows().items()
        }
        correction = self.centre.correction.with_rows(rows)
        return Candidate(replace(self.centre.trajectory, sigmas=self._sigmas(point)), correction)

    def _sigmas(self, point: Point) -> tuple[float, ...]:
        trajectory, inner = self.centre.trajectory, self._inner
        first, last = trajectory.sigmas[0], trajectory.sigmas[-1]
        if not inner:
            return trajectory.sigmas
        moved = [inner[0] + point["level"]]
        for i, (before, after) in enumerate(pairwise(inner), start=2):
            moved.append(moved[-1] + (after - before) * 2.0 ** point[f"gap {i}"])
        least = log_snr(first, trajectory.flow)
        most = log_snr(max(last, self.lowest), trajectory.flow)
        sigmas = [first]
        for i, value in enumerate(moved):
            value = min(value, most - (len(moved) - i) * self.APART)
            value = max(value, least + self.APART)
            least = value
            sigmas.append(sigma_of(value, trajectory.flow))
        return (*sigmas, last)


@dataclass(frozen=True)
class SolverSpace:
    """A solver of ``menu`` for every step of a trajectory, and a ramp (USF, arXiv 2312.07243).

    The first of the menu is the trajectory's own.  "corrector" says whether a step's end is computed
    again, "c_1" how much a multistep solver takes of the step before, in all steps alike.  At a step
    to sigma 0 there are only the trajectory's own and those that do not return the prediction.
    """

    trajectory: Trajectory
    menu: tuple[StepSolver, ...]
    low: float = 0.8
    high: float = 1.2
    ends: bool = False

    HISTORY: ClassVar[Range] = (0.5, 1.5)  # of c_1

    def __post_init__(self):
        check_range(self.low, self.high)

    @property
    def _ramp(self) -> RampSpace:
        return RampSpace(self.trajectory, self.low, self.high, self.ends)

    @property
    def _menus(self) -> dict[str, tuple[StepSolver, ...]]:
        """What each step may have."""
        steps = self.trajectory.steps
        menus = {f"solver {i + 1}": self.menu for i in range(steps)}
        if self.trajectory.sigmas[-1] == 0:
            others = (step for step in self.menu[1:] if step.solver.extrapolates)
            menus[f"solver {steps}"] = (self.menu[0], *others)
        return {name: menu for name, menu in menus.items() if len(menu) > 1}

    @property
    def _correctors(self) -> tuple[str, ...]:
        """After the last step there is no prediction to correct it with."""
        return tuple(f"{CORRECTOR} {i + 1}" for i in range(self.trajectory.steps - 1))

    @property
    def choices(self) -> tuple[str, ...]:
        return (*self._menus, *self._correctors)

    @property
    def bounds(self):
        bounds = {name: (0.0, len(menu) - 1.0) for name, menu in self._menus.items()}
        bounds |= dict.fromkeys(self._correctors, (0.0, 1.0))
        return bounds | {SECOND_ORDER: self.HISTORY} | self._ramp.bounds

    @property
    def start(self):
        return self.single(0)

    def single(self, place: int, corrected: bool = False) -> dict[str, float]:
        """The menu's solver at ``place`` in every step that may have it, with c = 1."""
        step = self.menu[place]
        places = {n: float(m.index(step)) if step in m else 0.0 for n, m in self._menus.items()}
        correctors = dict.fromkeys(self._correctors, float(corrected))
        return places | correctors | {SECOND_ORDER: 1.0} | self._ramp.start

    def candidate(self, point):
        own, correction = self.trajectory, self._ramp.candidate(point).correction
        menus, solvers = self._menus, []
        for i, step in enumerate(own.solvers, start=1):
            menu = menus.get(f"solver {i}")
            chosen = step if menu is None else menu[round(point[f"solver {i}"])]
            solvers.append(self._learned(chosen, point.get(f"{CORRECTOR} {i}", 0.0), point))
        return Candidate(replace(own, solvers=tuple(solvers)), correction)

    def _learned(self, step: StepSolver, corrector: float, point: Point) -> StepSolver:
        """``step`` with those of its options that differ from their defaults."""
        wanted = {CORRECTOR: round(corrector), SECOND_ORDER: point[SECOND_ORDER]}
        learned = {
            option.name: float(wanted[option.name])
            for option in step.solver.learned
            if wanted[option.name] != option.default
        }
        return replace(step, options={**step.options, **learned}) if learned else step


@dataclass(frozen=True)
class ListSpace:
    """Candidates that were computed before: the one coordinate is a place among them.

    Its range goes beyond the places: none of them lies on the edge of anything.
    """

    candidates: tuple[Candidate, ...]

    @property
    def bounds(self):
        return {"place": (-1.0, float(len(self.candidates)))}

    @property
    def start(self):
        return {"place": 0.0}

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple({"place": float(k)} for k in range(len(self.candidates)))

    def candidate(self, point):
        return self.candidates[round(point["place"])]


class _Nothing:
    """A box without coordinates, for trials that are evaluated but not searched."""

    bounds: Mapping[str, Range] = MappingProxyType({})
    start: Point = MappingProxyType({})

    def candidate(self, point):
        raise CalibrationError("nothing is searched here")


NOTHING = _Nothing()


def on_edge(space: Space, point: Point, share: float = 0.01) -> list[str]:
    """Names of the coordinates within ``share`` of their range from its end."""
    return [
        name
        for name, (low, high) in space.bounds.items()
        if name not in choices_of(space)
        and min(point[name] - low, high - point[name]) <= share * (high - low)
    ]


def grid_points(space: Space, size: int) -> list[dict[str, float]]:
    """``size`` evenly spaced values a dimension, ends included; the last name varies fastest."""
    points: list[dict[str, float]] = [{}]
    for name, (low, high) in space.bounds.items():
        values = [low + (high - low) * i / (size - 1) for i in range(size)]
        points = [{**point, name: value} for point in points for value in values]
    return points


def sobol_points(space: Space, count: int, seed: int) -> list[dict[str, float]]:
    """``count`` points of a scrambled Sobol sequence: an even first look at the box."""
    bounds = space.bounds
    engine = torch.quasirandom.SobolEngine(len(bounds), scramble=True, seed=seed % 2**63)
    return [
        {
            name: low + (high - low) * share
            for (name, (low, high)), share in zip(bounds.items(), row, strict=True)
        }
        for row in engine.draw(count, dtype=torch.float64).tolist()
    ]
