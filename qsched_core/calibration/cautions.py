"""What a user should look at before believing a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev

from ..objective import Scores
from ..prompts import CalibrationPrompts, PromptSet
from ..search.engine import Trial, best_of
from ..statistics import paired_interval
from ..text import markdown

FEW_PROMPTS = 10
MOST_OF_THE_GAIN = 0.8
MUCH_MORE_SPREAD = 5.0
FAR_BELOW = 0.35  # log CLIPScore lost: the score fell to 70 %


def cautions(
    trials: Sequence[Trial], heldout: tuple[Scores, Scores], prompts: CalibrationPrompts
) -> Iterator[str]:
    """Warnings with their numbers and what to do; ``heldout`` are scores before and after."""
    first, winner = trials[0], best_of(trials)
    if len(trials) > 1 and len({trial.scores.jaq for trial in trials}) == 1:
        yield (
            "every candidate scored the same: the objective does not see the coefficients; "
            "try another scorer"
        )
    elif winner is not first:
        if winner.edges:
            yield (
                f"the best candidate lies on the edge of the search ({', '.join(winner.edges)}); "
                "a wider range (low, high, radius) may hold a better one"
            )
        yield from _quality(trials)
        yield from _gaming(heldout, prompts.heldout)
    for name, members in (("calibration", prompts.calibration), ("held-out", prompts.heldout)):
        if len(members) < FEW_PROMPTS:
            yield f"{len(members)} {name} prompts are few; about 20 are usual"


def _parts(scores: Scores) -> tuple[float, float]:
    """Means of the alignment and of the weighted quality, whose sum is JAQ."""
    alignment = fmean(scores.alignment)
    return alignment, scores.mean() - alignment


def _quality(trials: Sequence[Trial]) -> Iterator[str]:
    first, winner = trials[0], best_of(trials)
    (a0, q0), (a1, q1) = _parts(first.scores), _parts(winner.scores)
    gain = winner.value - first.value
    if gain > 0 and q1 - q0 > MOST_OF_THE_GAIN * gain:
        yield (
            f"{(q1 - q0) / gain:.0%} of the calibration gain of {gain:.4f} comes from the quality "
            f"term (alignment {a1 - a0:+.4f}, quality {q1 - q0:+.4f}): look at the pictures, or "
            "lower quality_weight"
        )
    whole = [_parts(trial.scores) for trial in trials if not trial.pruned]
    spread = [pstdev(column) for column in zip(*whole, strict=True)]
    if len(whole) > 2 and spread[1] > MUCH_MORE_SPREAD * spread[0]:
        yield (
            f"over the candidates the quality term varies by {spread[1]:.4f} and alignment by "
            f"{spread[0]:.4f}: quality alone decides the search; lower quality_weight"
        )


def _quoted(prompt: str) -> str:
    return f"'{markdown(prompt, 120)}'"


def _gaming(heldout: tuple[Scores, Scores], prompts: PromptSet) -> Iterator[str]:
    before, after = heldout
    change = paired_interval(before.alignment, after.alignment)
    gain = after.mean() - before.mean()
    if change.high < 0 and gain > 0:
        yield (
            f"held-out JAQ rose by {gain:.4f} while alignment fell ({change}): the pictures leave "
            "their prompts to please the quality term; lower quality_weight"
        )
    falls = [a - b for a, b in zip(before.alignment, after.alignment, strict=True)]
    far = [i for i, fall in enumerate(falls) if fall > FAR_BELOW]
    if far:
        worst = max(far, key=falls.__getitem__)
        yield (
            f"{len(far)} of {len(falls)} held-out pictures lost more than {FAR_BELOW} of alignment "
            f"(worst {falls[worst]:.2f}: {_quoted(prompts.prompts[worst])}): look at them in JAQ Evaluate"
        )
