"""The canvas of all charts: text stays in its place, in the characters that its font has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qsched_core.canvas import PAPER, Canvas
from qsched_core.text import drawable

CANVAS = Canvas(400)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def inked(picture) -> np.ndarray:
    ground = np.array([int(PAPER[k : k + 2], 16) for k in (1, 3, 5)])
    return (np.abs(np.asarray(picture).astype(int) - ground) > 8).any(2)


@given(TEXT, st.integers(40, 300), st.sampled_from([12, 20]))
@settings(max_examples=60, deadline=None)
def test_wrapped_text_is_whole_and_no_line_is_too_wide(text, width, size):
    lines = CANVAS.wrap(text, width, size)
    assert "".join(lines).replace(" ", "") == "".join(drawable(" ".join(text.split())).split())
    assert all(CANVAS.length(line, size) <= width for line in lines)


@pytest.mark.parametrize("text", ["word " * 50, "x" * 300, "short " + "y" * 300])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_what_is_left_out_is_said_by_dots(text, most):
    lines = CANVAS.wrap(text, 150, 14, most)
    assert len(lines) == most and lines[-1].endswith("...")
    assert all(CANVAS.length(line, 14) <= 150 for line in lines)
    assert text.startswith(lines[0].removesuffix("..."))


def test_text_that_fits_is_not_cut():
    assert CANVAS.wrap("a short\n text", 300, 14, 1) == ["a short text"]
    assert CANVAS.cut("a short text", CANVAS.length("a short text")) == "a short text"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9", "cafe"),
        ("\u043a\u0440\u0443\u0433 1", "[Cyrillic:4] 1"),
        ("a \u732b\u304c b", "a [Cjk/Hiragana:2] b"),
        ("\U0001f600!", "[symbols:1]!"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_what_the_font_lacks_is_named(text, shown):
    assert drawable(text) == shown


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_any_text_is_drawn_within_its_width(text):
    canvas = Canvas(200)
    canvas.text(20, 10, text, size=16, width=100)
    columns = inked(canvas.finish(40)).any(0).nonzero()[0]
    assert not len(columns) or (columns.min() >= 17 and columns.max() <= 122)


@pytest.mark.parametrize("scale", [1, 2])
def test_the_sheet_grows_and_keeps_what_was_drawn(scale):
    canvas = Canvas(100, scale)
    canvas.bar(10, 10, 20, 20, "#000000")
    canvas.picture(30, 2000, Image.new("RGB", (4, 4), "red"), 40, 60)
    made = canvas.finish(2100.5)
    assert made.size == (100, 2101) and made.mode == "RGB"
    assert made.getpixel((15, 15)) == (0, 0, 0)
    assert made.getpixel((50, 2030)) == (255, 0, 0)
    assert made.getpixel((50, 2080)) == tuple(int(PAPER[k : k + 2], 16) for k in (1, 3, 5))


def test_paragraphs_end_below_their_lines():
    canvas = Canvas(300)
    end = canvas.paragraph(10, 10, "many words " * 12, 200, size=16)
    rows = inked(canvas.finish(end)).any(1).nonzero()[0]
    assert rows.min() >= 10 and end - 24 < rows.max() < end
