"""What every attack gives back: how many cases it tried, and a file for each that failed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsched_core.files import write_atomic

MOST_FILES = 50  # of one run: more of them tell nothing new


@dataclass(frozen=True)
class Failure:
    """A case that was not survived.

    ``case`` (plain JSON) is all that the ``attack`` needs to do the same again; ``data`` is the input
    it was made with, if there was one.
    """

    attack: str
    case: Mapping[str, Any]
    problem: str
    data: bytes = b""

    def to_json(self) -> str:
        content = {
            "attack": self.attack,
            "case": dict(self.case),
            "problem": self.problem,
            "data": base64.b64encode(self.data).decode(),
        }
        return json.dumps(content, indent=1)

    @classmethod
    def load(cls, path: Path) -> Failure:
        """ValueError for a file that :func:`keep` did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            data = base64.b64decode(content["data"])
            return cls(content["attack"], dict(content["case"]), content["problem"], data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no failure of bench reliability: {error}") from None


@dataclass(frozen=True)
class Outcome:
    """``cases`` were tried, ``asked`` for; ``note`` says of what kinds.

    ``figure`` is what the row compares with ``limit``; without one it is the share of failures.
    ``skipped`` says why nothing could be tried here.
    """

    cases: int
    failures: Sequence[Failure]
    note: str
    figure: float | None = None
    limit: float = 0.0
    unit: str = "failures"
    skipped: str = ""


@dataclass(frozen=True)
class Setting:
    """How much of an attack is asked for: ``size`` cases, drawn from ``seed``, in the folder ``work``."""

    size: int
    seed: int
    work: Path
    tell: Callable[[str], None] = field(default=print)


def keep(failures: Sequence[Failure], folder: Path) -> list[Path]:
    """Write each failure as a file to rerun; the first ``MOST_FILES`` of them."""
    kept = []
    for failure in failures[:MOST_FILES]:
        text = failure.to_json()
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = folder / f"{failure.attack}-{name}.json"
        kept.append(write_atomic(path, text))
    return kept
