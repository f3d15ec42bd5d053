"""How formats were chosen for a size, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, Page
from .sized import Point, SizedResult, sized_report

WIDTH, MARGIN, LEFT = 1200, 32, 96
HEIGHT = 130  # pixels of a chart
COLORS = (ORANGE, BLUE, GREEN, PURPLE, INK)  # of the ladder's formats


def budget_picture(found: SizedResult, title: str) -> Image.Image:
    """RGB, 1200 wide: the choice in words, every layer's bits and cost, and the mix among formats."""
    page = Page(WIDTH, MARGIN)
    page.at(MARGIN, title, size=26, width=WIDTH - 2 * MARGIN)
    page.space(40)
    for line in sized_report(found).splitlines():
        page.write(line, INK if found.holds else ORANGE)
    page.space()
    colors = dict(zip(found.budget.ladder, COLORS * len(found.budget.ladder), strict=False))
    shown = {option.format for option in found.allocation.chosen}
    x = MARGIN
    for form in (*colors, *sorted(shown - colors.keys())):
        if form in shown:
            page.bar(x, page.y + 4, x + 14, page.y + 18, colors.get(form, GREY))
            page.at(x + 22, form)
            x += 40 + page.length(form, 15)
    page.space(30)
    _bits(page, found, colors)
    _costs(page, found, colors)
    if found.uniform:
        _line(page, (*found.uniform, found.mixed), colors)
    return page.finish(page.y + MARGIN)


def _columns(count: int, index: int) -> tuple[float, float]:
    """Left and right of a layer's column."""
    step = (WIDTH - MARGIN - LEFT) / max(1, count)
    x = LEFT + index * step
    return x, max(x + 1, x + step - (1 if step > 3 else 0))


def _scale(page: Page, top: float, labels: Sequence[str]) -> None:
    """Lines from the bottom of a chart to its top, each with its label."""
    for k, label in enumerate(labels):
        y = top + HEIGHT - HEIGHT * k / max(1, len(labels) - 1)
        page.line([(LEFT, y), (WIDTH - MARGIN, y)], FAINT)
        page.text(LEFT - 10, y, label, INK, 14, "rm")


def _bits(page: Page, found: SizedResult, colors: dict[str, str]) -> None:
    rows = found.allocation.rows()
    page.at(MARGIN, "bits a weight of each layer")
    top, most = page.y + 34, max(row["bits"] for row in rows)
    _scale(page, top, [f"{most * share:.3g}" for share in (0, 0.5, 1)])
    for k, row in enumerate(rows):
        x, end = _columns(len(rows), k)
        color = colors.get(row["format"], GREY)
        page.bar(x, top + HEIGHT * (1 - row["bits"] / most), end, top + HEIGHT, color)
    page.y = top + HEIGHT + 14


def _costs(page: Page, found: SizedResult, colors: dict[str, str]) -> None:
    """What each layer costs alone: in the smallest format (grey) and as it was chosen."""
    page.at(
        MARGIN,
        "what each layer alone costs the model's output: as chosen, and in its smallest format "
        "(grey); relative squared error, log scale",
    )
    pairs = [
        (cost.smallest.error, option.error, option.format)
        for cost, option in zip(found.allocation.costs, found.allocation.chosen, strict=True)
    ]
    known = [error for *errors, _ in pairs for error in errors if error > 0]
    top = page.y + 34
    low, high = (math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))) if known else (-1, 0)  # fmt: skip
    high = max(high, low + 1)
    _scale(page, top, [f"{10.0 ** (low + (high - low) * k / 2):.0e}" for k in range(3)])

    def height(error: float) -> float:
        return top + HEIGHT * (1 - (math.log10(error) - low) / (high - low))

    for k, (smallest, error, form) in enumerate(pairs):
        x, end = _columns(len(pairs), k)
        if smallest > 0:
            page.dot((x + end) / 2, height(smallest), GREY, 3)
        if error > 0:
            page.dot((x + end) / 2, height(error), colors.get(form, GREY), 3)
    names = [cost.name for cost in found.allocation.costs]
    half = (WIDTH - MARGIN - LEFT) / 2 - 10
    page.text(LEFT, top + HEIGHT + 6, names[0], GREY, 13, width=half)
    page.text(WIDTH - MARGIN, top + HEIGHT + 6, names[-1], GREY, 13, "ra", half)
    page.y = top + HEIGHT + 40


def _line(page: Page, points: Sequence[Point], colors: dict[str, str]) -> None:
    """Held-out distance (log scale) over bits: uniform formats, the line between them, the mix."""
    page.at(MARGIN, "held-out distance (log scale) over bits a weight")
    top = page.y + 34
    logs = [math.log10(max(point.distance, 1e-30)) for point in points]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    first, last = (f(point.bits for point in points) for f in (min, max))
    first, last = first - 0.1, last + 0.1
    _scale(page, top, [f"{10 ** (low + (high - low) * k / 2):.2g}" for k in range(3)])
    places = [
        (
            LEFT + (point.bits - first) / (last - first) * (WIDTH - MARGIN - LEFT),
            top + HEIGHT * (1 - (log - low) / (high - low)),
        )
        for point, log in zip(points, logs, strict=True)
    ]
    if len(points) > 2:
        page.line(places[:-1], GREY)
    for point, (x, y) in zip(points, places, strict=True):
        color = colors.get(point.format, INK)
        page.dot(x, y, color, 5, square=point.format == "mixed")
        right = x > WIDTH / 2
        text = f"{point.format} {point.bits:.2f} bits, {point.distance:.5f}"
        page.text(x - 10 if right else x + 10, y - 9, text, color, 14, "ra" if right else "la")
    page.y = top + HEIGHT + 20
