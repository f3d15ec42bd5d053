"""What a scorer says of a schedule that a person's rankings made: told beside it, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..prompts import PromptSet
from ..source import Measure, Source, scored
from ..statistics import Interval, paired_interval
from ..study.errors import CalibrationError
from ..study.journal import fingerprint
from ..study.rankings import RankingStudy
from ..trajectory import Candidate


@dataclass(frozen=True)
class Beside:
    """JAQ on held-out prompts of c = 1 and of the best by rankings: the mean gain's interval."""

    gain: Interval

    @property
    def text(self) -> str:
        if self.gain.low > 0:
            says = "the scorer agrees with you"
        elif self.gain.high < 0:
            says = "the scorer prefers c = 1; your rankings stand"
        else:
            says = "the scorer can't tell it from c = 1; your rankings stand"
        return f"JAQ over c = 1, held-out: {self.gain}: {says}"

    def to_dict(self) -> dict[str, Any]:
        return {"jaq_gain": self.gain.to_dict()}


def beside(
    study: RankingStudy, source: Source, measure: Measure, best: Candidate, prompts: PromptSet
) -> Beside | None:
    """The gain of ``best`` over c = 1 on ``prompts``; None while c = 1 is the best.

    The open ``study`` keeps the scores, so nothing is scored twice.  CalibrationError for one prompt
    alone, which gives no interval.
    """
    if len(prompts) < 2:
        raise CalibrationError("one held-out prompt gives no interval; give at least 2")
    if best.is_identity:
        return None

    def jaq(candidate: Candidate) -> tuple[float, ...]:
        about = {
            "measure": measure.describe(),
            "prompts": prompts.hash,
            "correction": candidate.correction.to_json(),
        }
        return study.noted(
            fingerprint(about)[:24],
            lambda: scored(source, measure, [candidate], prompts)[0].jaq,
        )

    base = Candidate.identity(best.trajectory)
    return Beside(paired_interval(jaq(base), jaq(best)))
