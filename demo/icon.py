"""The pack's icon, ``docs/icon.png``: ``python -m demo.icon``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIZE, SCALE = 400, 4
GROUND, GREY, BLUE, ORANGE = "#15181d", "#4a525e", "#5fa8ff", "#ff9d4d"
PATH = Path(__file__).resolve().parent.parent / "docs" / "icon.png"
STEPS = ((60, 92), (153, 178), (246, 246), (340, 308))  # a trajectory of four steps
CORRECTED = ((60, 92), (153, 206), (246, 286), (340, 322))


def draw() -> Image.Image:
    """A trajectory of four steps, and the corrected one below it."""
    image = Image.new("RGBA", (SIZE * SCALE, SIZE * SCALE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle(_scaled((0, 0, SIZE - 1, SIZE - 1)), 72 * SCALE, GROUND)
    for x, _ in STEPS:
        pen.line(_scaled((x, 60, x, 340)), GREY, 3 * SCALE)
    for points, colour in ((STEPS, BLUE), (CORRECTED, ORANGE)):
        pen.line([_scaled(point) for point in points], colour, 14 * SCALE, "curve")
        for x, y in points:
            pen.ellipse(_scaled((x - 16, y - 16, x + 16, y + 16)), colour)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _scaled(values):
    return tuple(value * SCALE for value in values)


if __name__ == "__main__":
    draw().save(PATH, optimize=True)
