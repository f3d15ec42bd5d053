"""A sheet for charts, drawn with PIL alone: text that stays in its place, lines, bars, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .text import drawable

PAPER, INK, GREY, FAINT = "#fbfbf9", "#1d1f21", "#5f656e", "#d5d8dc"
BLUE, ORANGE, PURPLE, GREEN = "#1f5fae", "#b54e08", "#6b3fa0", "#1c7a4f"
_DOTS = "..."


class Canvas:
    """An opaque light sheet, ``width`` pixels wide, that grows downward with what is drawn.

    Places are pixels of the finished picture.  ``scale`` draws larger and reduces at the end: PIL's
    lines have no antialiasing.
    """

    def __init__(self, width: int, scale: int = 1, paper: str = PAPER):
        self.width, self._scale, self._paper = width, scale, paper
        self._image = Image.new("RGB", (width * scale, 512 * scale), paper)
        self._draw = ImageDraw.Draw(self._image)

    def finish(self, height: float) -> Image.Image:
        """The RGB picture, of so many pixels' height."""
        self._room(height)
        size = (self.width, math.ceil(height))
        used = self._image.crop((0, 0, *(side * self._scale for side in size)))
        return used if self._scale == 1 else used.resize(size, Image.Resampling.LANCZOS)

    def _room(self, bottom: float) -> None:
        needed = math.ceil(bottom) * self._scale
        if needed > self._image.height:
            size = (self._image.width, max(needed, 2 * self._image.height))
            grown = Image.new("RGB", size, self._paper)
            grown.paste(self._image)
            self._image, self._draw = grown, ImageDraw.Draw(grown)

    def _scaled(self, *values: float) -> tuple[float, ...]:
        return tuple(value * self._scale for value in values)

    def text(
        self, x: float, y: float, text: str, color: str = INK, size: int = 16, anchor: str = "la",
        width: float | None = None,
    ) -> None:  # fmt: skip
        """One line; cut with dots where it is wider than ``width``.  ``anchor`` is PIL's."""
        self._room(y + 2 * size)
        shown = drawable(text) if width is None else self.cut(text, width, size)
        self._draw.text(self._scaled(x, y), shown, color, _font(size * self._scale), anchor)

    def paragraph(
        self, x: float, y: float, text: str, width: float, color: str = INK, size: int = 16,
        row: float | None = None, most: int | None = None,
    ) -> float:  # fmt: skip
        """Wrapped text; the y below it."""
        for line in self.wrap(text, width, size, most):
            self.text(x, y, line, color, size)
            y += size + 8 if row is None else row
        return y

    def length(self, text: str, size: int = 16) -> float:
        """The width of a line."""
        return self._draw.textlength(drawable(text), _font(size * self._scale)) / self._scale

    def cut(self, text: str, width: float, size: int = 16) -> str:
        """``text``, or as much of its beginning as fits into ``width`` with dots."""
        text = drawable(text)
        if self.length(text, size) <= width:
            return text
        fits, too_long = 0, len(text)
        while fits < too_long - 1:
            middle = (fits + too_long) // 2
            fitting = self.length(text[:middle] + _DOTS, size) <= width
            fits, too_long = (middle, too_long) if fitting else (fits, middle)
        return text[:fits].rstrip() + _DOTS

    def wrap(self, text: str, width: float, size: int = 16, most: int | None = None) -> list[str]:
        """Lines no wider than ``width``, at most ``most``; words that are longer are broken."""
        words, lines = drawable(" ".join(text.split())).split(), [""]
        while words:
            if most is not None and len(lines) == most:
                lines[-1] = self.cut(" ".join([lines[-1], *words]).strip(), width, size)
                break
            word = words.pop(0)
            longer = f"{lines[-1]} {word}".strip()
            if self.length(longer, size) <= width:
                lines[-1] = longer
            elif lines[-1]:
                lines.append("")
                words.insert(0, word)
            else:
                fits = max(k for k in range(1, len(word))
                           if k == 1 or self.length(word[:k], size) <= width)  # fmt: skip
                lines[-1] = word[:fits]
                lines.append("")
                words.insert(0, word[fits:])
        return lines

    def line(
        self, points: Sequence[tuple[float, float]], color: str = INK, width: float = 1
    ) -> None:
        self._room(max(y for _, y in points) + width)
        scaled = [self._scaled(*point) for point in points]
        self._draw.line(scaled, color, round(width * self._scale), joint="curve")

    def dashes(self, x0: float, x1: float, y: float, color: str = GREY, width: float = 1) -> None:
        for x in range(round(x0), round(x1), 10):
            self.line([(x, y), (min(x + 5, x1), y)], color, width)

    def bar(self, x0: float, y0: float, x1: float, y1: float, color: str) -> None:
        self._room(y1 + 1)
        self._draw.rectangle(self._scaled(x0, y0, x1, y1), color)

    def dot(
        self, x: float, y: float, color: str, radius: float = 4, square: bool = False, rim: int = 0
    ) -> None:
        self._room(y + radius + 1)
        shape = self._draw.rectangle if square else self._draw.ellipse
        box = self._scaled(x - radius, y - radius, x + radius, y + radius)
        shape(box, color, self._paper if rim else None, rim * self._scale)

    def frame(self, height: float, color: str = FAINT) -> None:
        """A line around the sheet."""
        self._room(height)
        right, bottom = self._scaled(self.width, math.ceil(height))
        self._draw.rectangle((0, 0, right - 1, bottom - 1), outline=color, width=self._scale)

    def picture(self, x: float, y: float, picture: Image.Image, width: int, height: int) -> None:
        self._room(y + height)
        size = (width * self._scale, height * self._scale)
        fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        self._image.paste(fitted, tuple(round(value) for value in self._scaled(x, y)))


class Page(Canvas):
    """Draws downward, row by row, inside a margin; ``y`` is the current row's."""

    def __init__(self, width: int, margin: int):
        super().__init__(width)
        self.y = self.margin = margin

    def space(self, height: int = 14) -> None:
        self.y += height

    def at(
        self, x: float, text: str, color: str = INK, size: int = 15, width: float | None = None
    ) -> None:
        """Text on the current row; does not move to the next."""
        self.text(x, self.y, text, color, size, width=width)

    def write(self, text: str, color: str = INK, size: int = 16, most: int | None = 4) -> None:
        width = self.width - 2 * self.margin
        self.y = self.paragraph(self.margin, self.y, text, width, color, size, most=most)

    def rule(self) -> None:
        self.line([(self.margin, self.y), (self.width - self.margin, self.y)], FAINT)
        self.y += 8


@lru_cache(maxsize=64)
def _font(size: int):
    return ImageFont.load_default(size=size)
