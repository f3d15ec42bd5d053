"""What an evaluation gives: arms, their paired gains, and distances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..objective import Scores
from ..prompts import PromptSet
from ..search.guard import Interval, mean_interval
from .study import ArmStudy, Part

REFERENCES = "reference images"


@dataclass(frozen=True)
class ArmResult:
    """What an arm gave; ``new_images`` were made in this call, the others were on disk."""

    name: str
    label: str
    scores: Scores
    features: Mapping[str, torch.Tensor]
    seconds: float
    model_evaluations: int
    new_images: int
    study: ArmStudy = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    fresh: Mapping[int, torch.Tensor] = field(repr=False)  # unrounded pictures by part

    @cached_property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """Every score by name, a value a prompt."""
        return score_columns(self.scores)

    def images(self) -> torch.Tensor:
        """All pictures [n, height, width, 3] in [0, 1]; those that were not kept unrounded have 256
        levels, as any picture file has."""
        parts = [
            self.fresh[p.start]
            if p.start in self.fresh
            else self.study.pictures(p, range(p.start, p.start + len(p))).float() / 255
            for p in self.parts
        ]
        return torch.cat(parts)

    def picture(self, index: int) -> torch.Tensor:
        """The uint8 picture [height, width, 3] of prompt ``index``."""
        part = next(p for p in self.parts if p.start <= index < p.start + len(p))
        return self.study.pictures(part, range(index, index + 1))[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "scores": self.scores.to_dict(),
            "means": self.scores.means(),
            "intervals": {n: mean_interval(v).to_dict() for n, v in self.columns.items()},
            "seconds": self.seconds,
            "model_evaluations": self.model_evaluations,
            "new_images": self.new_images,
        }


@dataclass(frozen=True)
class Comparison:
    """The paired gain of ``after`` over ``before`` in every score; empty for a single prompt."""

    before: str
    after: str
    gains: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "gains": {name: gain.to_dict() for name, gain in self.gains.items()},
        }


@dataclass(frozen=True)
class Distance:
    """Frechet distance of ``arm``'s pictures from ``against`` (an arm, or the reference images)."""

    space: str
    dimensions: int
    arm: str
    against: str
    images: int
    against_images: int
    value: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class DistanceChange:
    """How much farther ``after`` is from ``against`` than ``before``: below 0 it is nearer."""

    space: str
    before: str
    after: str
    against: str
    change: Interval

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"change": self.change.to_dict()}


@dataclass(frozen=True)
class Evaluation:
    """``arms`` and ``comparisons`` in the order the arms were given; ``notes`` are for the reader."""

    prompts: PromptSet
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    distances: tuple[Distance, ...]
    changes: tuple[DistanceChange, ...]
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.name == name)

    def comparison(self, before: str, after: str) -> Comparison:
        return next(c for c in self.comparisons if (c.before, c.after) == (before, after))

    @property
    def new_images(self) -> int:
        return sum(arm.new_images for arm in self.arms)

    def to_dict(self) -> dict[str, Any]:
        """Everything but features and pictures, as plain JSON."""
        return {
            "prompts": list(self.prompts.prompts),
            "seeds": list(self.prompts.seeds),
            "arms": {arm.name: arm.to_dict() for arm in self.arms},
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "frechet": [distance.to_dict() for distance in self.distances],
            "frechet_changes": [change.to_dict() for change in self.changes],
            "notes": list(self.notes),
            "new_images": self.new_images,
        }


def score_columns(scores: Scores) -> dict[str, tuple[float, ...]]:
    """Every score and term by name, the objective's own first."""
    content = scores.to_dict()
    terms = content.pop("terms", {})
    first = {"jaq": content.pop("jaq")}
    return {name: tuple(values) for name, values in (first | content | terms).items()}
