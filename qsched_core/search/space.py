"""What is searched: boxes of named numbers, each point of which is a correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from ..precondition import ScalarCorrection
from ..schedule import MAX_COEFFICIENT, MIN_COEFFICIENT, linear_ramp
from ..text import shown
from .errors import CalibrationError

Point = Mapping[str, float]
Range = tuple[float, float]


class Space(Protocol):
    """A box; ``start`` is a point that is known to be good."""

    @property
    def bounds(self) -> dict[str, Range]: ...

    @property
    def start(self) -> dict[str, float]: ...

    def correction(self, point: Point) -> ScalarCorrection:
        """The coefficients at ``point``."""
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

    steps: int
    low: float = 0.8
    high: float = 1.2
    ends: bool = False

    def __post_init__(self):
        check_range(self.low, self.high)

    @property
    def bounds(self):
        names = ["c_x start", "c_eps start"]
        if self.ends and self.steps > 1:
            names += ["c_x end", "c_eps end"]
        return dict.fromkeys(names, (self.low, self.high))

    @property
    def start(self):
        return dict.fromkeys(self.bounds, 1.0)

    def correction(self, point):
        return ScalarCorrection(
            *(
                linear_ramp(point[f"{name} start"], point.get(f"{name} end", 1.0), self.steps)
                for name in ("c_x", "c_eps")
            )
        )


@dataclass(frozen=True)
class StepSpace:
    """Two free numbers a step, within ``radius`` of what lies between ``centre`` and 1.

    ``free`` names the steps that are searched (all by default); the others stay at the centre.
    """

    centre: ScalarCorrection
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

    def point(self, correction: ScalarCorrection) -> dict[str, float]:
        """The point whose correction this is."""
        steps = range(len(self.centre.c_x)) if self.free is None else self.free
        return {
            f"{name}[{i}]": getattr(correction, name)[i] for name in ("c_x", "c_eps") for i in steps
        }

    def correction(self, point):
        return ScalarCorrection(
            *(
                tuple(point.get(f"{name}[{i}]", kept) for i, kept in enumerate(values))
                for name, values in (("c_x", self.centre.c_x), ("c_eps", self.centre.c_eps))
            )
        )


class _Nothing:
    """The box without a coordinate: for what is evaluated but not searched."""

    bounds: Mapping[str, Range] = MappingProxyType({})
    start: Point = MappingProxyType({})

    def correction(self, point):
        raise CalibrationError("nothing is searched here")


NOTHING = _Nothing()


def on_edge(space: Space, point: Point, share: float = 0.01) -> list[str]:
    """Names of the coordinates within ``share`` of their range from its end."""
    return [
        name
        for name, (low, high) in space.bounds.items()
        if min(point[name] - low, high - point[name]) <= share * (high - low)
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
