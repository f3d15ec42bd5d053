"""Where a search keeps its trials: what every kind of storage offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..objective import Scores

Point = Mapping[str, float]
Range = tuple[float, float]


class Box(Protocol):
    """What the points of a stage lie in.

    A box may have ``choices``, names of coordinates that are places 0, 1, ... in a list: no place is
    between two others.
    """

    @property
    def bounds(self) -> Mapping[str, Range]: ...


def choices_of(space: Box) -> tuple[str, ...]:
    """The names of the coordinates of ``space`` that are places in a list."""
    return getattr(space, "choices", ())


@dataclass(frozen=True)
class Record:
    """A finished trial: its place in the stage, and what it gave.

    A ``pruned`` trial saw the first prompts only; its scores are as many.
    """

    slot: int
    point: Point
    scores: Scores
    seconds: float
    nfe: int
    pruned: bool = False

    def attributes(self) -> dict[str, Any]:
        """Plain JSON of the record."""
        return {
            "slot": self.slot,
            "point": dict(self.point),
            "scores": self.scores.to_dict(),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "pruned": self.pruned,
        }

    @classmethod
    def of(cls, point: Point, attributes: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`attributes`; older studies kept the ``point`` apart."""
        older = "model_evaluations"  # what studies of older nodes call it
        return cls(
            attributes["slot"],
            dict(attributes.get("point", point)),
            Scores.from_dict(attributes["scores"]),
            attributes["seconds"],
            attributes["nfe" if "nfe" in attributes else older],
            attributes["pruned"],
        )


class Claim(Protocol):
    """Slots that this worker evaluates; a context manager.

    ``points`` by slot, without slots that another worker took first.  Slots that are not finished
    are given back at the end.
    """

    points: Mapping[int, Point]

    def __enter__(self) -> Claim: ...

    def __exit__(self, *exception) -> None: ...

    def finish(self, record: Record) -> None:
        """Keep the trial; on return it is stored for good."""
        ...


class Store(Protocol):
    """The trials of one study, in stages; each stage has slots 0, 1, 2, ...

    ``where`` names the place to the user (no passwords).
    """

    where: str

    def records(self, stage: str) -> dict[int, Record]:
        """The finished trials by slot, in the order of slots."""
        ...

    def working(self, stage: str) -> dict[int, Point]:
        """What other workers are evaluating now, by slot; those that stopped answering are not."""
        ...

    def claim(self, stage: str, space: Box, points: Mapping[int, Point]) -> Claim:
        """Take the slots for this worker, so that no other evaluates them."""
        ...

    def get(self, key: str) -> Any:
        """What was put under ``key``, or None."""
        ...

    def put(self, key: str, value: Any) -> None:
        """Keep plain JSON beside the trials."""
        ...
