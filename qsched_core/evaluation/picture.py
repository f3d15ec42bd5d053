"""An evaluation as one picture: scores with intervals, and the same prompts from every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..search.guard import Interval
from ..search.report import typical
from ..text import drawable
from .results import Evaluation
from .table import cost_line, distance_lines, verdict

WIDTH, MARGIN, NAME = 1200, 32, 150
INK, GREY, LIGHT, PAPER = (30, 32, 36), (105, 110, 118), (225, 228, 232), (255, 255, 255)
GREEN, ORANGE = (22, 130, 80), (200, 90, 10)
ROW, BAR = 26, 190
LARGEST = 360  # pixels of an example's width


def report_picture(evaluation: Evaluation) -> Image.Image:
    """RGB, 1200 wide.  The examples are the worst, the median and the best gain of the last arm."""
    page = _Page()
    page.text("Q-Sched evaluation", size=26, row=36)
    for comparison in evaluation.comparisons:
        gain = comparison.gains.get("jaq")
        color = INK if gain is None else _color(gain)
        page.paragraph(verdict(evaluation, comparison), color)
    _means(page, evaluation)
    _gains(page, evaluation)
    if evaluation.distances:
        page.space()
        for line in distance_lines(evaluation):
            page.paragraph(line)
    page.space()
    for note in evaluation.notes:
        page.paragraph(f"note: {note}", GREY, 14)
    page.paragraph(cost_line(evaluation), GREY, 14)
    _examples(page, evaluation)
    return page.finish()


def _color(gain: Interval) -> tuple[int, int, int]:
    return GREEN if gain.low > 0 else ORANGE if gain.high < 0 else INK


def _font(size: int):
    return ImageFont.load_default(size=size)


class _Page:
    """Draws downward on a sheet that grows with what is drawn."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH, 512), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def room(self, height: int) -> None:
        """Grow so that ``height`` more pixels fit."""
        needed = math.ceil(self.y + height + MARGIN)
        if needed > self.image.height:
            grown = Image.new("RGB", (WIDTH, max(needed, 2 * self.image.height)), PAPER)
            grown.paste(self.image)
            self.image, self.draw = grown, ImageDraw.Draw(grown)

    def finish(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, math.ceil(self.y + MARGIN)))

    def space(self, height: int = 14) -> None:
        self.y += height

    def at(self, x: float, text: str, color=INK, size: int = 15, anchor: str = "la") -> None:
        """Text on the current row, which stays."""
        self.room(ROW)
        self.draw.text((x, self.y), drawable(text), color, _font(size), anchor)

    def text(self, text: str, color=INK, size: int = 16, row: int = ROW) -> None:
        self.at(MARGIN, text, color, size)
        self.y += row

    def paragraph(self, text: str, color=INK, size: int = 16) -> None:
        for line in self.wrap(text, WIDTH - 2 * MARGIN, size):
            self.text(line, color, size, row=size + 8)

    def wrap(self, text: str, width: float, size: int, most: int = 4) -> list[str]:
        """At most ``most`` lines no wider than ``width``; words that are longer are cut."""
        lines, font = [""], _font(size)
        for word in drawable(text).split():
            while self.draw.textlength(word, font) > width:
                word = word[: len(word) * 3 // 4]
            longer = f"{lines[-1]} {word}".strip()
            if self.draw.textlength(longer, font) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-3]}..."]

    def rule(self) -> None:
        self.room(8)
        self.draw.line((MARGIN, self.y, WIDTH - MARGIN, self.y), LIGHT, 1)
        self.y += 8


def _header(page: _Page, first: str, labels: Sequence[str], width: float, size: int = 15) -> None:
    """Column heads, which may take several lines."""
    page.space()
    heads = [page.wrap(label, width - 16, size, most=3) for label in labels]
    page.at(MARGIN, first, GREY, size)
    top = page.y
    page.room(20 * max(map(len, heads)) + ROW)
    for k, lines in enumerate(heads):
        for row, line in enumerate(lines):
            page.y = top + 20 * row
            page.at(MARGIN + NAME + k * width, line, INK, size)
    page.y = top + 20 * max(map(len, heads)) + 6
    page.rule()


def _means(page: _Page, evaluation: Evaluation) -> None:
    """A row a score, a column an arm: mean with its interval."""
    arms = evaluation.arms
    width = (WIDTH - 2 * MARGIN - NAME) / len(arms)
    count = len(evaluation.prompts)
    _header(page, f"{count} prompt{'s' if count > 1 else ''}", [a.label for a in arms], width)
    for name in arms[0].columns:
        page.at(MARGIN, name, GREY)
        for k, arm in enumerate(arms):
            interval = arm.intervals[name]
            x = MARGIN + NAME + k * width
            page.at(x, f"{interval.mean:.4f}", INK, 16)
            page.at(x + 78, f"[{interval.low:.4f}, {interval.high:.4f}]", GREY, 14)
        page.y += ROW


def _gains(page: _Page, evaluation: Evaluation) -> None:
    """A row a score, a column a comparison: the gain, and its interval against zero as a bar."""
    given = [c for c in evaluation.comparisons if c.gains]
    if not given:
        return
    labels = {arm.name: arm.label for arm in evaluation.arms}
    width = (WIDTH - 2 * MARGIN - NAME) / len(given)
    heads = [f"{labels[c.after]} - {labels[c.before]}" for c in given]
    _header(page, "paired gain", heads, width)
    for name in evaluation.arms[0].columns:
        page.at(MARGIN, name, GREY)
        gains = [comparison.gains[name] for comparison in given]
        reach = max(abs(end) for gain in gains for end in (gain.low, gain.high)) or 1.0
        for k, gain in enumerate(gains):
            _bar(page, MARGIN + NAME + k * width, min(BAR, width - 110), gain, reach)
        page.y += ROW


def _bar(page: _Page, left: float, width: float, gain: Interval, reach: float) -> None:
    color = _color(gain)
    page.at(left, f"{gain.mean:+.4f}", color, 16)
    middle, y = left + 86 + width / 2, page.y + 9

    def place(value: float) -> float:
        return middle + value / reach * width / 2

    page.draw.line((middle, y - 9, middle, y + 9), GREY, 1)
    page.draw.line((place(gain.low), y, place(gain.high), y), color, 3)
    x = place(gain.mean)
    page.draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)


def _examples(page: _Page, evaluation: Evaluation) -> None:
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
    page.text(title, GREY, 14, row=24)
    for index in typical(values):
        pictures = [Image.fromarray(arm.picture(index).numpy()) for arm in arms]
        height = max(1, round(pictures[0].height * size / pictures[0].width))
        page.room(height + 12)
        top = page.y
        sign = "+" if len(arms) > 1 else ""
        page.at(MARGIN, format(values[index], f"{sign}.4f"), INK, 16)
        for line in page.wrap(prompts[index], NAME - 16, 13, most=max(1, (height - 24) // 17)):
            page.y += 17 if page.y > top else 24
            page.at(MARGIN, line, GREY, 13)
        for k, picture in enumerate(pictures):
            fitted = picture.resize((size, height), Image.Resampling.LANCZOS)
            page.image.paste(fitted, (round(MARGIN + NAME + k * width), round(top)))
        page.y = top + height + 12
