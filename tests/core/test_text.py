"""Text of others as it is shown: nothing hidden, nothing that a page or a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from evaluation_cases import evaluated, three_arms
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import scalar_schedule

from qsched_core.evaluation.picture import report_picture
from qsched_core.evaluation.table import images_csv, report_text
from qsched_core.formats.report import LayerRow, table
from qsched_core.prompts import PromptSet
from qsched_core.schedule.chart import draw
from qsched_core.schedule.summary import provenance_rows, summary
from qsched_core.text import (
    csv_cell,
    drawable,
    json_for_page,
    markdown,
    markup_free,
    plain,
    said,
    shown,
)

HONEST = (
    "a red cat", "\u4e00\u53ea\u7ea2\u732b", "\u0440\u044b\u0436\u0438\u0439 \u043a\u043e\u0442",
    "\u05d7\u05ea\u05d5\u05dc", "\u0642\u0637 \u0623\u062d\u0645\u0631", "caf\u00e9 \u2014 na\u00efve",
    "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", "\u0915\u094d\u200d\u0937", "\U0001f469\u200d\U0001f680",
)  # fmt: skip
HIDDEN = (
    "\x00\x07\x1b\r\n\t\x85\xad\u061c\u200b\u200e\u200f\u2028\u202a\u202e\u2066\u2069\u2060\ufeff"
)
EVIL = "=1+1<img src=x onerror=alert(1)>[x](javascript:1)\u202e\x1b[31m`*"


@pytest.mark.parametrize("text", HONEST)
def test_letters_of_every_script_stay(text):
    assert plain(text) == markdown(text) == csv_cell(text) == text
    assert (
        shown(text).strip("'\"").replace("\\u200c", "\u200c").replace("\\u200d", "\u200d") == text
    )


@pytest.mark.parametrize("letter", HIDDEN + "\u200c\u200d\ud800\U000e0041")
def test_what_is_not_seen_becomes_a_visible_escape(letter):
    escaped = letter.encode("unicode_escape").decode()
    for show in (plain, markdown, csv_cell):
        assert show(f"a{letter}b") == f"a{escaped}b"
    assert escaped in drawable(f"a{letter}b")


@given(st.text(st.characters(), max_size=60), st.integers(8, 40))
def test_any_text_becomes_one_short_visible_line(text, most):
    for made in (plain(text, most), shown(text, most)):
        assert len(made) <= most
        made.encode()
        assert not set(made) & set(HIDDEN)


def test_markup_is_shown_and_not_rendered():
    for text, made in (
        ("<b>&lt;", "&lt;b&gt;&amp;lt;"),
        ("[a](b) *c* `d` _e_ a|b", r"\[a\](b) \*c\* \`d\` \_e\_ a\|b"),
        ("# head", r"\# head"),
        ("1. one", r"1\. one"),
        ("sd_xl_turbo-1.0 + x (nf4)", "sd_xl_turbo-1.0 + x (nf4)"),
        ("C:\\Users\\me", "C:\\Users\\me"),
    ):
        assert markdown(text) == made
    assert markup_free("a < b\n<i>") == "a &lt; b\n&lt;i&gt;"


def test_json_for_a_page_is_the_same_json():
    text = json.dumps({"a": "<script>&amp;"})
    assert not set(json_for_page(text)) & set("<>&")
    assert json.loads(json_for_page(text)) == json.loads(text)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", " =", "\uff1d"])
def test_a_cell_is_no_formula(first):
    assert csv_cell(f"{first}SUM(A1)").startswith("'")


def test_our_numbers_stay_numbers():
    assert [csv_cell(value) for value in (-1.5, 3, None)] == [-1.5, 3, None]


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    made = evaluated(tmp_path_factory.mktemp("evil"), three_arms(), 3)
    arms = tuple(replace(arm, label=f"{EVIL} {arm.name}") for arm in made.arms)
    prompts = PromptSet((EVIL, *made.prompts.prompts[1:]), made.prompts.seeds)
    return replace(made, arms=arms, prompts=prompts, notes=(EVIL,))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no\nmore of it"), "no"),
        (ValueError("\n "), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError("a" * 300), "a" * 197 + "..."),
        (OSError("\x1b[1m\u202e"), "\\x1b[1m\\u202e"),
    ],
)
def test_a_librarys_error_is_one_short_line(error, text):
    assert said(error) == text


def test_the_report_of_an_evaluation_renders_as_it_reads(evil):
    text = report_text(evil)
    assert "<img" not in text and "[x](" not in text and not set(text) & set("\u202e\x1b")
    assert "&lt;img" in text and "\\u202e" in text


def test_the_csv_of_an_evaluation_has_no_formula(evil):
    rows = list(csv.DictReader(io.StringIO(images_csv(evil))))
    assert rows[0]["prompt"].startswith("'=1+1") and "\\u202e" in rows[0]["prompt"]
    assert float(rows[0]["jaq"]) == evil.arms[0].scores.jaq[0]
    assert rows[1]["prompt"] == "thing 1"


def test_the_picture_of_an_evaluation_is_drawn(evil):
    assert report_picture(evil).width == 1200


def test_provenance_of_a_schedule_is_shown_as_it_is():
    found = {"source": EVIL, "model": {"source": EVIL, "format": "\x1b]0;x\x07"}}
    made = scalar_schedule((1.0, 0.0), (1.0,), (1.0,), provenance=found)
    for value in dict(provenance_rows(made)).values():
        assert not set(value) & set("\u202e\x1b\x07")
    assert "<img" not in summary(made) and "\\u202e" in summary(made)
    assert draw(made).width == 1200


def test_layers_of_a_file_are_named_as_they_are():
    text = table([LayerRow(EVIL, "linear", (2, 2), "nf4", 4), LayerRow("a_b.c", "", (2,), "x", 1)])
    assert "<img" not in text and "\\u202e" in text and "a_b.c" in text
