"""Reports as one HTML file: whole, readable, and without anything from a network."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from evaluation_cases import ONE, Brightness, PaintSource
from PIL import Image

from qsched_core.evaluation import Arm, evaluate
from qsched_core.evaluation.web import report_page
from qsched_core.prompts import PromptSet
from qsched_core.webpage import Bars, Compared, Curves, Table, page

HOSTILE = '<img src="http://x.example/a.png" onerror=alert(1)> & </script>'


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def picture(colour: str, size=(64, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_nothing_is_read_from_anywhere():
    two = [(HOSTILE, picture("red")), (HOSTILE, picture("blue"))]
    bars = Bars(HOSTILE, [HOSTILE, "b"], {HOSTILE: [1.0, 2.0]})
    text = page(
        HOSTILE,
        [
            HOSTILE,
            Compared(HOSTILE, two),
            Table([HOSTILE], [], HOSTILE),
            bars,
            Compared("", two * 2),
        ],
    )
    found = Tags(text)
    assert not re.search(r"(src|href|action)=\"?(?!data:)[a-z]+:", text)
    sources = [a["src"] for _, a in found.tags if "src" in a]
    assert len(sources) == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "content" in a)
    assert policy.startswith("default-src 'none'")
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert HOSTILE in found.texts


def test_pictures_lie_under_a_slider_with_their_labels():
    found = Tags(page("t", [Compared("c", [("one", picture("red")), ("two", picture("blue"))])]))
    images = [a for tag, a in found.tags if tag == "img"]
    assert [a["alt"] for a in images] == ["one", "two"]
    assert {"one", "two"} <= set(found.texts)
    for attributes, colour in zip(images, ((255, 0, 0), (0, 0, 255)), strict=True):
        data = base64.b64decode(attributes["src"].partition(",")[2])
        shown = Image.open(BytesIO(data))
        assert shown.size == (64, 32)
        assert max(abs(a - b) for a, b in zip(shown.getpixel((30, 10)), colour, strict=True)) < 8
    assert any(a.get("type") == "range" for tag, a in found.tags if tag == "input")


@pytest.mark.parametrize("values", [{"a": [0.0, 0.0]}, {"a": [1.0, 1e-9], "b": [3.0, 1e9]}])
def test_bars_stay_inside_their_drawing_and_say_their_values(values):
    found = Tags(page("t", [Bars("bars", ["first", "second"], values)]))
    drawn = [
        {k: float(v) for k, v in a.items() if k != "fill"} for t, a in found.tags if t == "rect"
    ]
    assert len(drawn) == 3 * len(values)
    for box in drawn:
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1060
        assert box["y"] >= 0 and box["y"] + box["height"] <= 260
    told = ", ".join(f"{name} {series[1]:.3g}" for name, series in values.items())
    assert f"second, {told}" in found.texts


def test_curves_stay_inside_their_drawing():
    found = Tags(page("t", [Curves("c", {"a": [1.0, 5.0, 3.0], "flat": [2.0, 2.0, 2.0]})]))
    lines = [a["points"] for tag, a in found.tags if tag == "polyline"]
    assert len(lines) == 2
    for line in lines:
        for point in line.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 720
            assert 0 <= y <= 260
    only = Tags(page("t", [Curves("c", {"same": [2.0, 2.0]})]))
    assert any(tag == "polyline" for tag, _ in only.tags)


def test_an_evaluation_has_its_figures_and_pictures(tmp_path):
    prompts = PromptSet(("dark", HOSTILE, "bright"), (1, 2, 3))
    arms = [
        Arm("quantized", PaintSource(), ONE, "int2"),
        Arm("schedule", PaintSource(0.1), ONE, "+"),
    ]
    found = evaluate(arms, prompts, Brightness(), [], tmp_path)
    text = report_page(found)
    tags = Tags(text)
    for name, interval in found["schedule"].intervals.items():
        assert name in tags.texts
        assert f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]" in tags.texts
    assert sum(tag == "img" for tag, _ in tags.tags) == 6
    assert sum(tag == "polyline" for tag, _ in tags.tags) == 2
    assert any(said.endswith(HOSTILE) for said in tags.texts)


def test_one_arm_and_one_prompt_are_a_report_too(tmp_path):
    arms = [Arm("quantized", PaintSource(), ONE, "int2")]
    for seeds in ((1,), (1, 2)):
        prompts = PromptSet(("a", "b")[: len(seeds)], seeds)
        found = evaluate(arms, prompts, Brightness(), [], tmp_path / str(len(seeds)))
        assert "<table>" in report_page(found)
