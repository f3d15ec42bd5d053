"""A report as one HTML file that people can post: figures, curves, and pictures before and after.

It reads nothing from a network: pictures are inside, and its policy forbids everything else.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from .text import plain

COLOURS = ("#1f5fae", "#b54e08", "#1c7a4f", "#6b3fa0")
LARGEST = 1024  # pixels of a picture's longer side
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1d1f21; background: #fbfbf9; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #d5d8dc; padding: .3em .9em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0 1em 1.5em 0; vertical-align: top; max-width: 512px; }
figcaption { color: #5f656e; font-size: 14px; }
.pair { position: relative; display: block; }
.pair img { display: block; width: 100%; }
.pair img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 50%); }
input { width: 100%; }
svg { max-width: 100%; height: auto; }
"""
_SCRIPT = """
for (const slider of document.querySelectorAll('input[type=range]'))
    slider.addEventListener('input', () => {
        const after = slider.parentElement.querySelector('.pair img + img')
        after.style.clipPath = `inset(0 0 0 ${slider.value}%)`
    })
"""


@dataclass(frozen=True)
class Table:
    """``head`` and ``rows`` of cells; the first column is the rows' names."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Curves:
    """Lines over the same places on the x axis, by name; two or more finite values each."""

    title: str
    lines: Mapping[str, Sequence[float]]
    x: str = ""


@dataclass(frozen=True)
class Pair:
    """The same picture twice, under a slider; ``before`` is on its left."""

    caption: str
    before: Image.Image
    after: Image.Image


Part = str | Table | Curves | Pair


def page(title: str, parts: Sequence[Part]) -> str:
    """The whole file; a text is a paragraph, one that begins with "## " a heading."""
    body = "\n".join(_part(part) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(plain(text))


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Curves):
        return _curves(part)
    if isinstance(part, Pair):
        return _pair(part)
    if part.startswith("## "):
        return f"<h2>{_text(part[3:])}</h2>"
    return f"<p>{_text(part)}</p>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<table>{row(table.head, 'th')}\n{rows}</table>"


def _curves(curves: Curves, width: int = 720, height: int = 260) -> str:
    values = [value for line in curves.lines.values() for value in line]
    low, high = min(values), max(values)
    reach, left, bottom = (high - low) or 1.0, 60, height - 40
    drawn = []
    for colour, (place, (name, line)) in zip(
        COLOURS * len(curves.lines), enumerate(curves.lines.items()), strict=False
    ):
        step = (width - left - 20) / max(1, len(line) - 1)
        points = " ".join(
            f"{left + i * step:.1f},{bottom - (value - low) / reach * (bottom - 40):.1f}"
            for i, value in enumerate(line)
        )
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        drawn.append(f'<text x="{left + place * 160}" y="22" fill="{colour}">{_text(name)}</text>')
    for value, y in ((high, 40), (low, bottom)):
        drawn.append(f'<text x="4" y="{y + 5}" fill="#5f656e">{value:.3g}</text>')
    drawn.append(f'<text x="{left}" y="{height - 10}" fill="#5f656e">{_text(curves.x)}</text>')
    drawing = "".join(drawn)
    return (
        f'<h3>{_text(curves.title)}</h3><svg viewBox="0 0 {width} {height}" width="{width}" '
        f'font-size="13" role="img">{drawing}</svg>'
    )


def _pair(pair: Pair) -> str:
    images = "".join(
        f'<img alt="{name}" src="{_data(picture)}">'
        for name, picture in (("before", pair.before), ("after", pair.after))
    )
    return (
        f'<figure><div class="pair">{images}</div>'
        '<input type="range" min="0" max="100" value="50" aria-label="before and after">'
        f"<figcaption>{_text(pair.caption)}</figcaption></figure>"
    )


def _data(picture: Image.Image) -> str:
    """The picture as a data URL; JPEG, for a report is to be posted."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
