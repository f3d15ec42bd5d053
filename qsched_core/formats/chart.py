"""A picture of a quantized model: bits, size and error of every layer, in the model's order."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..canvas import FAINT, INK, Canvas
from .report import LayerRow, summary

WIDTH, MARGIN, LEFT = 1200, 24, 76
COLORS = (
    "#2f6db3", "#d9822b", "#3a9d6a", "#b3446c", "#7b5ea7", "#8c7a3d", "#2aa1b3", "#a65339",
)  # fmt: skip
PLAIN = "#8a8f98"  # float dtypes


def draw(rows: Sequence[LayerRow], title: str) -> Image.Image:
    """RGB picture, 1200 pixels wide, its text dark on a light ground whatever is around it.

    A column a layer: bits a weight, megabytes, relative weight error where it is known, and of
    calibrated layers the output error, with plain rounding's behind it.
    """
    groups = summary(rows)
    colors = _colors(groups)
    measured = any(r.error is not None for r in rows)
    panels = [
        ("bits a weight", [r.bits for r in rows]),
        ("megabytes", [r.nbytes / 1e6 for r in rows]),
    ]
    if measured:
        panels.append(("relative weight error", [r.error or 0.0 for r in rows]))
    pen = Canvas(WIDTH)
    pen.text(MARGIN, MARGIN, title, INK, 24, width=WIDTH - 2 * MARGIN)
    top = MARGIN + 40
    for row in groups:
        error = "" if row.error is None else f", error {row.error:.4f}"
        pen.bar(MARGIN, top + 4, MARGIN + 14, top + 18, colors[row.format])
        text = (
            f"{row.format}: {row.name}, {row.weights / 1e6:.2f} M weights, "
            f"{row.nbytes / 1e6:.2f} MB, {row.bits:.2f} bits a weight{error}"
        )
        pen.text(MARGIN + 24, top, text, INK, width=WIDTH - 2 * MARGIN - 24)
        top += 24
    top += 20
    own = [colors[r.format] for r in rows]
    for label, values in panels:
        _panel(pen, top, label, [(values, own)])
        top += 190
    if any(r.calibrated is not None for r in rows):
        plain, found = zip(*(r.calibrated or (0.0, 0.0) for r in rows), strict=True)
        label = "relative output error of calibrated layers, and of plain rounding (grey)"
        _panel(pen, top, label, [(plain, [PLAIN] * len(rows)), (found, own)])
        top += 190
    if rows:
        half = (WIDTH - MARGIN - LEFT) / 2 - 10
        pen.text(LEFT, top, rows[0].name, INK, width=half)
        pen.text(WIDTH - MARGIN, top, rows[-1].name, INK, anchor="ra", width=half)
    return pen.finish(top + 40)


def _panel(pen: Canvas, top: int, label: str, layers: Sequence[tuple]) -> None:
    """One row of columns, 130 pixels high, with its scale.

    ``layers`` are values and their colors, drawn over one another.
    """
    bottom, right = top + 160, WIDTH - MARGIN
    pen.text(LEFT, top, label)
    highest = max((max(values, default=0) for values, _ in layers), default=0) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = bottom - round(125 * share)
        pen.line([(LEFT, y), (right, y)], FAINT)
        pen.text(LEFT - 10, y, f"{highest * share:.3g}", INK, anchor="rm")
    for values, colors in layers:
        step = (right - LEFT) / max(len(values), 1)
        for i, (value, color) in enumerate(zip(values, colors, strict=True)):
            if value > 0:
                x = LEFT + i * step
                end = max(x + 1, x + step - (1 if step > 3 else 0))
                pen.bar(x, bottom - 125 * value / highest, end, bottom, color)


def _colors(groups: Sequence[LayerRow]) -> dict[str, str]:
    plain = ("float", "bfloat")
    packed = [r.format for r in groups if not r.format.startswith(plain)]
    found = {form: COLORS[i % len(COLORS)] for i, form in enumerate(packed)}
    return {r.format: found.get(r.format, PLAIN) for r in groups}
