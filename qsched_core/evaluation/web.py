"""An evaluation as one HTML file."""

from __future__ import annotations

from PIL import Image

from ..calibration.report import typical
from ..statistics import Interval
from ..webpage import Compared, Curves, Part, Table, page
from .results import Evaluation
from .table import cost_line, distance_lines, verdict


def report_page(evaluation: Evaluation) -> str:
    """Verdicts, means and paired gains with 95 % intervals, gains sorted, and pictures to compare.

    The pictures are those of the worst, the median and the best gain of the last arm, before and
    after.
    """
    arms, names = evaluation.arms, list(evaluation.arms[0].columns)
    parts: list[Part] = [verdict(evaluation, comparison) for comparison in evaluation.comparisons]
    count = len(evaluation.prompts)
    parts.append(
        Table(
            [f"mean of {count} prompts", *(arm.label for arm in arms)],
            [[name, *(_shown(arm.intervals[name]) for arm in arms)] for name in names],
        )
    )
    labels = {arm.name: arm.label for arm in arms}
    given = [c for c in evaluation.comparisons if c.gains]
    if given:
        heads = [f"{labels[c.after]} - {labels[c.before]}" for c in given]
        rows = [[name, *(_shown(c.gains[name], "+") for c in given)] for name in names]
        parts.append(Table(["paired gain", *heads], rows))
    parts += distance_lines(evaluation)
    if len(arms) > 1:
        parts += _compared(evaluation)
    elif count > 1:
        scores = {arm.label: sorted(arm.scores.jaq) for arm in arms}
        parts.append(Curves("JAQ of every prompt, sorted", scores, "prompts"))
    parts += [f"note: {note}" for note in evaluation.notes]
    return page("Q-Sched evaluation", [*parts, cost_line(evaluation)])


def _compared(evaluation: Evaluation) -> list[Part]:
    """The last two arms: every prompt's gain, and three of them to look at."""
    before, after = evaluation.arms[-2:]
    gains = [b - a for a, b in zip(before.scores.jaq, after.scores.jaq, strict=True)]
    title = f"{after.label} against {before.label}"
    parts: list[Part] = [f"## {title}"]
    if len(gains) > 1:
        lines = {"gain": sorted(gains), "zero": [0.0] * len(gains)}
        parts.append(Curves("JAQ gain of every prompt, sorted", lines, "prompts"))
    parts.append("Worst, median and best gain.")
    parts += [
        Compared(
            f"{gains[i]:+.4f}: {evaluation.prompts.prompts[i]}",
            [(arm.label, Image.fromarray(arm.picture(i).numpy())) for arm in (before, after)],
        )
        for i in typical(gains)
    ]
    return parts


def _shown(interval: Interval, sign: str = "") -> str:
    numbers = (interval.mean, interval.low, interval.high)
    mean, low, high = (format(number, f"{sign}.4f") for number in numbers)
    return f"{mean} [{low}, {high}]"
