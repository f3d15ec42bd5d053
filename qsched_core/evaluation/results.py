"""What an evaluation gives: arms, their paired gains, and distances."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..files import disk_error
from ..objective import Scores
from ..prompts import PromptSet
from ..statistics import Interval, mean_interval
from .study import ArmStudy, Part

logger = logging.getLogger(__name__)

REFERENCES = "reference images"
BLOCK = 2048  # pictures; the features of so many are in memory at a time
MAPPED = 2**30  # bytes of pictures from which on they are mapped from a file


@dataclass(frozen=True)
class ArmResult:
    """What an arm gave; ``new_images`` were made in this call, the others were on disk."""

    name: str
    label: str
    scores: Scores
    seconds: float
    nfe: int
    new_images: int
    study: ArmStudy = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)

    @cached_property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """Every score by name, a value a prompt."""
        return score_columns(self.scores)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The mean of every score by name."""
        return {name: mean_interval(values) for name, values in self.columns.items()}

    def features(self, space: str) -> Iterator[torch.Tensor]:
        """Features in a space, as blocks [m, dim] of about ``BLOCK`` pictures."""
        block: list[torch.Tensor] = []
        for part in self.parts:
            block.append(self.study.features(part, space))
            if sum(map(len, block)) >= BLOCK:
                yield torch.cat(block)
                block = []
        if block:
            yield torch.cat(block)

    def images(self, scratch: Path | None = None) -> torch.Tensor:
        """All pictures [n, height, width, 3] in [0, 1], in the 256 levels of a picture file.

        With a folder ``scratch`` what is large is mapped from a file there, which goes with the
        tensor; without room there it is in memory.
        """
        first = self.picture(0)
        shape = (len(self.scores), *first.shape)
        needed = 4 * math.prod(shape)
        if scratch is not None and needed >= MAPPED:
            try:
                if shutil.disk_usage(scratch).free >= 2 * needed:
                    return self._mapped(scratch, shape)
            except OSError as error:
                told = disk_error(error, scratch, needed)
                logger.warning("%s; the pictures are kept in memory", told)
        images = torch.empty(shape)
        for part, pictures in self._pictures():
            images[part.start : part.start + len(part)] = pictures
        return images

    def _mapped(self, scratch: Path, shape: tuple[int, ...]) -> torch.Tensor:
        with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
            try:
                for _, pictures in self._pictures():
                    file.write(pictures.numpy())
                file.flush()
                return torch.from_file(file.name, shared=False, size=math.prod(shape)).view(shape)
            finally:
                with suppress(OSError):  # Windows can't delete a mapped file
                    os.unlink(file.name)

    def _pictures(self) -> Iterator[tuple[Part, torch.Tensor]]:
        for part in self.parts:
            indices = range(part.start, part.start + len(part))
            yield part, self.study.pictures(part, indices).float() / 255

    def picture(self, index: int) -> torch.Tensor:
        """The uint8 picture [height, width, 3] of prompt ``index``."""
        part = next(p for p in self.parts if p.start <= index < p.start + len(p))
        return self.study.pictures(part, range(index, index + 1))[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "scores": self.scores.to_dict(),
            "means": self.scores.means(),
            "intervals": {name: interval.to_dict() for name, interval in self.intervals.items()},
            "seconds": self.seconds,
            "nfe": self.nfe,
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
