"""A report as one HTML file that people can post: figures, curves, and pictures before and after.

It reads nothing from a network: pictures are inside, and its policy forbids everything else.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from .text import plain

COLOURS = ("#1f5fae", "#b54e08", "#1c7a4f", "#6b3fa0")
BEHIND = "#b9bec6"
LARGEST = 1024  # pixels of a picture's longer side
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1d1f21; background: #fbfbf9; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #d5d8dc; padding: .3em .9em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
details td:last-child { white-space: normal; text-align: left; }
figure { display: inline-block; margin: 0 1em 1.5em 0; vertical-align: top; width: 512px;
         max-width: 100%; }
figcaption { color: #5f656e; font-size: 14px; }
.stack { position: relative; display: block; }
.stack img { display: block; width: 100%; }
.stack img + img { position: absolute; inset: 0; visibility: hidden; }
.stack img:last-child { visibility: visible; clip-path: inset(0 0 0 50%); }
.sides { display: flex; justify-content: space-between; font-size: 14px; }
input { width: 100%; }
svg { max-width: 100%; height: auto; }
summary { cursor: pointer; }
.caution { border-left: 4px solid #b54e08; padding-left: .8em; }
"""
# Two of a figure's pictures lie one on the other: the slider says how much of the left one is seen.
_SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
    const images = [...figure.querySelectorAll('img')]
    const slider = figure.querySelector('input'), [left, right] = figure.querySelectorAll('select')
    const show = () => images.forEach((image, i) => {
        const on = [i === Number(left?.value ?? 0), i === Number(right?.value ?? 1)]
        image.style.visibility = on[0] || on[1] ? 'visible' : 'hidden'
        image.style.zIndex = on[1] ? 1 : 0
        image.style.clipPath = on[1] && !on[0] ? `inset(0 0 0 ${slider.value}%)` : 'none'
    })
    figure.addEventListener('input', show)
    show()
}
"""


@dataclass(frozen=True)
class Table:
    """``head`` and ``rows`` of cells; the first column is the rows' names.

    With ``folded`` this text alone is shown, and the table when the reader opens it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""


@dataclass(frozen=True)
class Curves:
    """Lines over the same places on the x axis, by name; two or more finite values each."""

    title: str
    lines: Mapping[str, Sequence[float]]
    x: str = ""


@dataclass(frozen=True)
class Bars:
    """For each of ``names`` a bar of every series, one before the other; values of 0 and more."""

    title: str
    names: Sequence[str]
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Compared:
    """The same picture in two or more versions, each with its label.

    Two lie under a slider: the first and the last, where the reader does not choose others.
    """

    caption: str
    pictures: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Caution:
    """A paragraph that the reader should not miss."""

    text: str


Part = str | Table | Curves | Bars | Compared | Caution


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
    if not isinstance(part, str):
        return _DRAWN[type(part)](part)
    if part.startswith("## "):
        return f"<h2>{_text(part[3:])}</h2>"
    return f"<p>{_text(part)}</p>"


def _caution(part: Caution) -> str:
    return f'<p class="caution">{_text(part.text)}</p>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    drawn = f"<table>{row(table.head, 'th')}\n{rows}</table>"
    if not table.folded:
        return drawn
    return f"<details><summary>{_text(table.folded)}</summary>{drawn}</details>"


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
    return _figure(curves.title, width, height, drawn)


def _bars(bars: Bars, width: int = 1060, height: int = 260) -> str:
    colours = (BEHIND, *COLOURS)
    highest = max(max(series) for series in bars.values.values()) or 1.0
    left, top, bottom = 60, 40, height - 30
    step = (width - left) / len(bars.names)
    drawn = []
    for place, (colour, name) in enumerate(zip(colours, bars.values, strict=False)):
        drawn.append(
            f'<rect x="{left + place * 200}" y="11" width="13" height="13" fill="{colour}"/>'
        )
        drawn.append(
            f'<text x="{left + 20 + place * 200}" y="22" fill="#1d1f21">{_text(name)}</text>'
        )
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        drawn.append(f'<line x1="{left}" y1="{y}" x2="{width}" y2="{y}" stroke="#d5d8dc"/>')
        drawn.append(f'<text x="4" y="{y + 5}" fill="#5f656e">{share * highest:.3g}</text>')
    for i, name in enumerate(bars.names):
        told, columns = [name], []
        for k, (colour, (label, series)) in enumerate(
            zip(colours, bars.values.items(), strict=False)
        ):
            told.append(f"{label} {series[i]:.3g}")
            wide = step * (0.9 - 0.4 * k / len(bars.values))
            tall = series[i] / highest * (bottom - top)
            columns.append(
                f'<rect x="{left + i * step + (step - wide) / 2:.1f}" y="{bottom - tall:.1f}" '
                f'width="{wide:.1f}" height="{tall:.1f}" fill="{colour}"/>'
            )
        drawn.append(f"<g><title>{_text(', '.join(told))}</title>{''.join(columns)}</g>")
    for x, anchor, name in ((left, "start", bars.names[0]), (width, "end", bars.names[-1])):
        drawn.append(
            f'<text x="{x}" y="{height - 8}" fill="#5f656e" text-anchor="{anchor}">{_text(name)}'
            "</text>"
        )
    return _figure(bars.title, width, height, drawn)


def _figure(title: str, width: int, height: int, drawn: Sequence[str]) -> str:
    return (
        f'<h3>{_text(title)}</h3><svg viewBox="0 0 {width} {height}" width="{width}" '
        f'font-size="13" role="img">{"".join(drawn)}</svg>'
    )


def _compared(compared: Compared) -> str:
    labels = [label for label, _ in compared.pictures]
    images = "".join(
        f'<img alt="{_text(label)}" src="{_data(picture)}">' for label, picture in compared.pictures
    )
    sides = (_text(labels[0]), _text(labels[-1]))
    if len(labels) > 2:
        sides = tuple(_chosen(labels, k) for k in (0, len(labels) - 1))
    return (
        f'<figure><div class="stack">{images}</div>'
        '<input type="range" min="0" max="100" value="50" aria-label="left and right">'
        f'<div class="sides"><span>{sides[0]}</span><span>{sides[1]}</span></div>'
        f"<figcaption>{_text(compared.caption)}</figcaption></figure>"
    )


def _chosen(labels: Sequence[str], place: int) -> str:
    """A list of ``labels`` to choose from; that at ``place`` is chosen."""
    options = "".join(
        f'<option value="{k}"{" selected" if k == place else ""}>{_text(label)}</option>'
        for k, label in enumerate(labels)
    )
    return f"<select>{options}</select>"


def _data(picture: Image.Image) -> str:
    """The picture as a data URL; JPEG, for a report is to be posted."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_DRAWN: Mapping[type, Callable[..., str]] = {
    Table: _table, Curves: _curves, Bars: _bars, Compared: _compared, Caution: _caution,
}  # fmt: skip
