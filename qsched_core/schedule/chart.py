"""A schedule as one picture: coefficients over the steps, every number, and where they come from.

Drawn with PIL alone, dark on opaque light: it reads the same on a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, Canvas
from . import summary
from .schedule import QSchedule
from .summary import Score

WIDTH, MARGIN, LEFT = 1200, 40, 150
SIGMA, GOOD = "#b9c0c9", GREEN
CURVES = (BLUE, ORANGE, PURPLE, GREEN)  # one for each parameter, in turn
PLOT, BARS, ROW, DOT = 380, 90, 34, 7
MAX_COLUMNS = 16
MAX_NAMED = 6  # columns that are wide enough for the names of solvers


def draw(schedule: QSchedule) -> Image.Image:
    """RGB picture, 1200 pixels wide; with more than 16 steps the table shows some of them."""
    rows, scores = summary.provenance_rows(schedule), summary.scores(schedule)
    pen = Canvas(WIDTH, scale=2)
    y = _head(pen, schedule)
    y = _plot(pen, y, schedule)
    y = _table(pen, y, schedule)
    y = _provenance(pen, y + 26, rows)
    if scores:
        y = _scores(pen, y + 18, scores)
    pen.frame(y + MARGIN)
    return pen.finish(y + MARGIN)


def _head(pen: Canvas, schedule: QSchedule) -> float:
    pen.text(MARGIN, MARGIN + 8, "Q-Sched schedule", INK, 34, "lm")
    right = WIDTH - MARGIN
    if schedule.original is not None:
        pen.text(right, MARGIN + 50, "thin: before the edits", GREY, 18, "rm")
        right -= pen.length("thin: before the edits", 18) + 40
    for name, _, color, square in reversed(_curves(schedule)):
        right -= pen.length(name, 22)
        pen.text(right, MARGIN + 50, name, color, 22, "lm")
        pen.dot(right - 16, MARGIN + 50, color, DOT, square, rim=2)
        right -= 60
    title = summary.title(schedule)
    pen.text(MARGIN, MARGIN + 50, title, GREY, 22, "lm", right - MARGIN)
    if schedule.is_identity:
        text = "all coefficients are 1: the base solver"
        if schedule.replaced_sigmas is not None:
            text = "all coefficients are 1; the noise levels are learned"
        pen.text(WIDTH - MARGIN, MARGIN + 8, text, GOOD, 22, "rm")
    return MARGIN + 84


def _curves(schedule: QSchedule) -> list[tuple[str, tuple[float, ...], str, bool]]:
    """Name, values, colour, and whether its dots are square, of every parameter."""
    return [
        (name, values, CURVES[k % len(CURVES)], k % 2 == 1)
        for k, (name, values) in enumerate(schedule.correction.rows().items())
    ]


def _columns(schedule: QSchedule) -> list[float]:
    """The x of every step's column."""
    left, right = LEFT + 30, WIDTH - MARGIN - 34
    if schedule.steps == 1:
        return [(left + right) / 2]
    inset = (right - left) / (schedule.steps * 6) if schedule.steps <= 4 else 0
    span = right - left - 2 * inset
    return [left + inset + span * i / (schedule.steps - 1) for i in range(schedule.steps)]


def _plot(pen: Canvas, top: float, schedule: QSchedule) -> float:
    """Coefficient curves on their axis; thin ones are those before the edits."""
    xs, bottom = _columns(schedule), top + PLOT
    before, parameters = schedule.original, schedule.correction.parameters
    drawn = [schedule] if before is None else [before, schedule]
    neutral = parameters[0].neutral
    values = [v for each in drawn for row in each.correction.rows().values() for v in row]
    low, high = _range([neutral, *values])

    def place(value: float) -> float:
        return bottom - (value - low) / (high - low) * PLOT

    def label(value: float, text: str, color: str) -> None:
        pen.line([(LEFT, place(value)), (WIDTH - MARGIN, place(value))], color)
        pen.text(LEFT - 14, place(value), text, GREY, 18, "rm")

    ends = sorted({end for p in parameters for end in (p.low, p.high)})
    limits = [limit for limit in ends if low <= limit <= high]
    for value, text in _ticks(low, high):
        if all(abs(place(value) - place(limit)) > 20 for limit in limits):
            label(value, text, FAINT)
    for limit in limits:
        label(limit, f"limit {limit:g}", GREY)
    pen.dashes(LEFT, WIDTH - MARGIN, place(neutral), width=1.5)
    if before is not None:
        for _, values, color, _ in _curves(before):
            pen.line([(x, place(value)) for x, value in zip(xs, values, strict=True)], color)
    curves = _curves(schedule)
    for _, values, color, square in curves:
        points = [(x, place(value)) for x, value in zip(xs, values, strict=True)]
        if len(points) == 1:
            points.append((xs[0], place(neutral)))
        pen.line(
            points, color, 2.5 if square else 5
        )  # so that both are seen where two curves are equal
    if schedule.steps > 2 * MAX_COLUMNS:
        return bottom
    for i, x in enumerate(xs):
        equal = len({values[i] for _, values, _, _ in curves}) < len(curves)
        for _, values, color, square in curves:
            side = (5 if square else -5) if equal else 0
            pen.dot(x + side, place(values[i]), color, DOT, square, rim=2)
    return bottom


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for ``values``, with some room on both sides."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.1, 0.02 - (high - low) / 2)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About six round numbers in between, and their text."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    digits = max(2, -math.floor(math.log10(step) + 1e-9))
    counts = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(k * step, f"{k * step:.{digits}f}") for k in counts]


def _table(pen: Canvas, top: float, schedule: QSchedule) -> float:
    """Bars of sigma, then the numbers, each under its step."""
    xs = _columns(schedule)
    shown = _shown(schedule.steps)
    gap = (xs[1] - xs[0]) if len(xs) > 1 else 120
    half = min(34, gap * 0.36)
    base = top + 36 + BARS
    pen.text(LEFT - 14, base - BARS / 2, "sigma", GREY, 18, "rm")
    for x, sigma in zip(xs, schedule.sigmas, strict=False):
        height = max(1.5, BARS * sigma / schedule.sigmas[0])
        pen.bar(x - half, base - height, x + half, base, SIGMA)
    pen.line([(LEFT, base), (WIDTH - MARGIN, base)], GREY, 1.5)
    digits = 4 if len(shown) <= 10 else 3
    rows = (
        ("step", INK, [str(i + 1) for i in range(schedule.steps)]),
        ("sigma", GREY, [f"{sigma:.{digits}g}" for sigma in schedule.sigmas[:-1]]),
        *(
            (name, color, [f"{value:.{digits}f}" for value in values])
            for name, values, color, _ in _curves(schedule)
        ),
    )
    if not schedule.trajectory.is_uniform and schedule.steps <= MAX_NAMED:
        rows += (("solver", INK, [step.label for step in schedule.trajectory.solvers]),)
    y = base + 26
    for name, color, cells in rows:
        pen.text(LEFT - 14, y, name, color, 20, "rm")
        for i in shown:
            pen.text(xs[i], y, cells[i], color, 20 if len(shown) <= 10 else 18, "mm")
        y += ROW
    end = f"the last step ends at sigma {schedule.sigmas[-1]:.4g}"
    if len(shown) < schedule.steps:
        end = f"{len(shown)} of {schedule.steps} steps are listed; {end}"
    pen.text(WIDTH - MARGIN, y, end, GREY, 18, "rm")
    return y + 12


def _shown(steps: int) -> list[int]:
    """Steps whose numbers have room: all up to 16, else evenly chosen with both ends."""
    count = min(steps, MAX_COLUMNS)
    if count == 1:
        return [0]
    return sorted({round(k * (steps - 1) / (count - 1)) for k in range(count)})


def _provenance(pen: Canvas, top: float, rows: Sequence[tuple[str, str]]) -> float:
    pen.line([(MARGIN, top), (WIDTH - MARGIN, top)], FAINT, 1.5)
    y = top + 28
    for label, value in rows:
        pen.text(LEFT - 14, y, label, GREY, 20, "rm")
        for line in pen.wrap(value, WIDTH - MARGIN - LEFT, 20, most=3):
            pen.text(LEFT, y, line, INK, 20, "lm")
            y += 28
        y += 4
    return y - 12


def _scores(pen: Canvas, top: float, scores: Sequence[Score]) -> float:
    """Scores before and after, and the gain with its interval against zero."""
    left, right = 760, WIDTH - MARGIN
    ends = [0.0, *(score.gain for score in scores)]
    ends += [end for score in scores for end in score.interval or ()]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.08 or 0.01
    low, high = low - room, high + room

    def place(gain: float) -> float:
        return left + (gain - low) / (high - low) * (right - left)

    pen.line([(MARGIN, top), (WIDTH - MARGIN, top)], FAINT, 1.5)
    y = top + 28
    pen.text(LEFT, y, "mean JAQ, c = 1 -> coefficients", GREY, 18, "lm")
    pen.text(left, y, "gain, 95 % interval (line: no gain)", GREY, 18, "lm")
    bottom = y + 20 + 44 * len(scores)
    pen.line([(place(0), y + 20), (place(0), bottom)], GREY, 1.5)
    for score in scores:
        y += 44
        count = "" if score.count is None else f" on {score.count} prompts"
        pen.text(LEFT - 14, y, score.part, GREY, 20, "rm")
        numbers = f"{score.before:.3f} -> {score.after:.3f}{count}"
        sure = score.interval is not None and score.interval[0] > 0
        pen.text(LEFT, y, numbers, INK, 20, "lm")
        pen.text(left - 30, y, f"{score.gain:+.4f}", GOOD if sure else INK, 20, "rm")
        if score.interval is not None:
            pen.line([(place(end), y) for end in score.interval], GOOD if sure else GREY, 3)
        pen.dot(place(score.gain), y, GOOD if sure else GREY, DOT, rim=2)
    return bottom
