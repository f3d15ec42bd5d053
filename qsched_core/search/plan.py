"""What a strategy is made of: stages, and what they are planned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..study.store import Point
from ..trajectory import Candidate, Trajectory
from .levels import LearnedLevels
from .space import RampSpace, Space


@dataclass(frozen=True)
class Past:
    """A finished candidate, as later stages see it."""

    candidate: Candidate
    value: float


@dataclass(frozen=True)
class Stage:
    """``trials`` points of ``space``: ``fixed`` first, the rest by ``sampler``.

    ``history`` are results of earlier stages that the sampler learns from.
    """

    name: str
    space: Space
    trials: int
    sampler: str = ""
    fixed: tuple[Point, ...] = ()
    history: tuple[tuple[Point, float], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a strategy needs to know: see ``CalibrationSettings`` for the fields.

    ``levels`` are there for a strategy that asks for them.  ``lowest`` is the smallest noise level
    above 0 that may be searched.
    """

    trajectory: Trajectory
    budget: int
    seed: int
    low: float
    high: float
    radius: float
    ends: bool = False
    levels: LearnedLevels | None = None
    lowest: float = 0.0

    @property
    def steps(self) -> int:
        return self.trajectory.steps

    def ramp(self) -> RampSpace:
        return RampSpace(self.trajectory, self.low, self.high, self.ends)


StageBuilder = Callable[[Plan, Sequence[Past]], Stage]
