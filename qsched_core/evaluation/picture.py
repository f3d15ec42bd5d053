"""An evaluation as one picture: scores with intervals, and the same prompts from every arm."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..calibration.report import typical
from ..canvas import GREEN, GREY, INK, ORANGE, Page
from ..statistics import Interval
from .results import Evaluation
from .table import cost_line, distance_lines, verdict

WIDTH, MARGIN, NAME = 1200, 32, 150
ROW, BAR = 26, 190
LARGEST = 360  # pixels of an example's width


def report_picture(evaluation: Evaluation) -> Image.Image:
    """RGB, 1200 wide.  The examples are the worst, the median and the best gain of the last arm."""
    page = Page(WIDTH, MARGIN)
    page.at(MARGIN, "Q-Sched evaluation", size=26)
    page.space(36)
    for comparison in evaluation.comparisons:
        gain = comparison.gains.get("jaq")
        color = INK if gain is None else _color(gain)
        page.write(verdict(evaluation, comparison), color)
    _means(page, evaluation)
    _gains(page, evaluation)
    if evaluation.distances:
        page.space()
        for line in distance_lines(evaluation):
            page.write(line)
    page.space()
    for note in evaluation.notes:
        page.write(f"note: {note}", GREY, 14)
    page.write(cost_line(evaluation), GREY, 14)
    _examples(page, evaluation)
    return page.finish(page.y + MARGIN)


def _color(gain: Interval) -> str:
    return GREEN if gain.low > 0 else ORANGE if gain.high < 0 else INK


def _header(page: Page, first: str, labels: Sequence[str], width: float, size: int = 15) -> None:
    """Column heads, which may take several lines."""
    page.space()
    heads = [page.wrap(label, width - 16, size, 3) for label in labels]
    page.at(MARGIN, first, GREY, size)
    top = page.y
    for k, lines in enumerate(heads):
        for row, line in enumerate(lines):
            page.y = top + 20 * row
            page.at(MARGIN + NAME + k * width, line, INK, size)
    page.y = top + 20 * max(map(len, heads)) + 6
    page.rule()


def _means(page: Page, evaluation: Evaluation) -> None:
    """A row a score, a column an arm: mean with its interval."""
    arms = evaluation.arms
    width = (WIDTH - 2 * MARGIN - NAME) / len(arms)
    count = len(evaluation.prompts)
    _header(page, f"{count} prompt{'s' if count > 1 else ''}", [a.label for a in arms], width)
    for name in arms[0].columns:
        page.at(MARGIN, name, GREY, width=NAME - 12)
        for k, arm in enumerate(arms):
            interval = arm.intervals[name]
            x = MARGIN + NAME + k * width
            page.at(x, f"{interval.mean:.4f}", INK, 16)
            page.at(x + 78, f"[{interval.low:.4f}, {interval.high:.4f}]", GREY, 14)
        page.y += ROW


def _gains(page: Page, evaluation: Evaluation) -> None:
    """A row a score, a column a comparison: the gain, and its interval against zero as a bar."""
    given = [c for c in evaluation.comparisons if c.gains]
    if not given:
        return
    labels = {arm.name: arm.label for arm in evaluation.arms}
    width = (WIDTH - 2 * MARGIN - NAME) / len(given)
    heads = [f"{labels[c.after]} - {labels[c.before]}" for c in given]
    _header(page, "paired gain", heads, width)
    for name in evaluation.arms[0].columns:
        page.at(MARGIN, name, GREY, width=NAME - 12)
        gains = [comparison.gains[name] for comparison in given]
        reach = max(abs(end) for gain in gains for end in (gain.low, gain.high)) or 1.0
        for k, gain in enumerate(gains):
            _bar(page, MARGIN + NAME + k * width, min(BAR, width - 110), gain, reach)
        page.y += ROW


def _bar(page: Page, left: float, width: float, gain: Interval, reach: float) -> None:
    color = _color(gain)
    page.at(left, f"{gain.mean:+.4f}", color, 16)
    middle, y = left + 86 + width / 2, page.y + 9

    def place(value: float) -> float:
        return middle + value / reach * width / 2

    page.line([(middle, y - 9), (middle, y + 9)], GREY)
    page.line([(place(gain.low), y), (place(gain.high), y)], color, 3)
    page.dot(place(gain.mean), y, color)


def _examples(page: Page, evaluation: Evaluation) -> None:
    """Rows of the same prompt's pictures from every arm."""
    arms, prompts = evaluation.arms, evaluation.prompts.prompts
    if len(arms) > 1:
        before, after = arms[-2].scores.jaq, arms[-1].scores.jaq
        values = [b - a for a, b in zip(before, after, strict=True)]
        title = f"worst, median and best JAQ gain of {arms[-1].label} over {arms[-2].label}"
    else:
        values = list(arms[0].scores.jaq)
        title = "lowest, median and highest JAQ"
    width = (WIDTH - 2 * MARGIN - NAME) / len(arms)
    size = round(min(LARGEST, width - 16))
    _header(page, "", [arm.label for arm in arms], width)
    page.y -= 40
    page.at(MARGIN, "examples", GREY)
    page.y += 40
    page.write(title, GREY, 14)
    page.space(2)
    for index in typical(values):
        pictures = [Image.fromarray(arm.picture(index).numpy()) for arm in arms]
        height = max(1, round(pictures[0].height * size / pictures[0].width))
        top = page.y
        sign = "+" if len(arms) > 1 else ""
        page.at(MARGIN, format(values[index], f"{sign}.4f"), INK, 16)
        most = max(1, (height - 24) // 17)
        page.paragraph(MARGIN, top + 24, prompts[index], NAME - 16, GREY, 13, 17, most)
        for k, picture in enumerate(pictures):
            page.picture(MARGIN + NAME + k * width, top, picture, size, height)
        page.y = top + height + 12
