"""Texts made to hold the server up: refused or read at once, and never shown in full.

The bounds are wide, so that a busy machine passes: what is caught here once took half a minute.
``python dev.py bench validation`` has the real figures, of every node.
"""

from __future__ import annotations

import time

import pytest
from schedule_cases import scalar_schedule

from benchmarks import _hostile
from qsched_core.files import safe_name
from qsched_core.formats import FormatError
from qsched_core.formats.overrides import (
    MAX_PATTERN,
    MAX_PATTERNS,
    MAX_TEXT,
    MAX_WILDCARDS,
)
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.objective import MAX_FORMULA, MAX_TERMS, recipe_of
from qsched_core.prompts import (
    CalibrationPrompts,
    check_apart,
    parse_prompts,
)
from qsched_core.schedule import QSchedule, ScheduleError
from qsched_core.solvers import get_solver
from qsched_core.validation import MAX_PARTS

SECONDS = 2.0  # for a whole set of texts that each took far more, or one of them did
LONGEST_MESSAGE = 1500
LAYERS = {f"double_blocks.{i}.img_attn.{part}": "linear" for i in range(400) for part in "abcde"}


def _prompts(text):
    """A node's prompts are read when it runs: what a page can hold is not held up by them."""
    if len(text) <= 2**18:
        lines = parse_prompts(text)
        check_apart(lines, [*lines[:1], "another"] if len(lines) > 1 else ["another"])


READERS = {
    "layers": lambda text: Policy("nf4", parse_overrides(text)),
    "formula": recipe_of,
    "quality": lambda text: recipe_of("", text),
    "schedule": QSchedule.from_json,
    "prompts": _prompts,
    "name": safe_name,
    "solver": get_solver,
    "weight_format": Policy,
}


@pytest.mark.parametrize("name", READERS)
def test_any_text_is_read_or_refused_at_once(name):
    started = time.perf_counter()
    for label, text in _hostile.texts(20_000):
        try:
            READERS[name](text)
        except ValueError as error:
            assert len(str(error)) < LONGEST_MESSAGE, label
            str(error).encode()
    assert time.perf_counter() - started < 2 * SECONDS


@pytest.mark.parametrize("text", [text for _, text in _hostile.schedules()][::7])
def test_any_json_is_read_or_refused_at_once(text):
    started = time.perf_counter()
    try:
        QSchedule.from_json(text)
    except ScheduleError as error:
        assert len(str(error)) < LONGEST_MESSAGE
    assert time.perf_counter() - started < SECONDS


def test_overrides_larger_than_anyone_writes_are_refused():
    fine = "|".join(["a"] * MAX_PATTERNS)
    assert len(parse_overrides(f"{fine}=nf4")[0].patterns) == MAX_PATTERNS
    parse_overrides(f"{'a' * MAX_PATTERN}=nf4; {'*' * MAX_WILDCARDS}=nf4")
    for text, said in (
        ("a" * (MAX_TEXT + 1), f"at most {MAX_TEXT}"),
        (f"{fine}|a=nf4", f"more than {MAX_PATTERNS} patterns"),
        (f"{fine}=nf4; b=nf4", f"more than {MAX_PATTERNS} patterns, from 'b=nf4' on"),
        (f"{'a' * (MAX_PATTERN + 1)}=nf4", f"at most {MAX_PATTERN}"),
        (f"{'*' * (MAX_WILDCARDS + 1)}=nf4", f"more than {MAX_WILDCARDS} wildcards"),
        (f"{'[' * 20}=nf4", f"more than {MAX_WILDCARDS} wildcards"),
    ):
        with pytest.raises(FormatError) as error:
            parse_overrides(text)
        assert said in str(error.value) and len(str(error.value)) < 300


def test_patterns_that_match_nothing_are_told_in_their_order():
    bad = parse_overrides("img_attn=nf4; *img*=nf4; img_atn=nf4; *mlp*=nf4")
    assert Policy("nf4", bad).unmatched(LAYERS) == ["img_atn", "*mlp*"]


def test_a_glob_of_many_stars_is_matched_at_once():
    policy = Policy("nf4", parse_overrides(f"{'*a' * MAX_WILDCARDS}b=int8"))
    started = time.perf_counter()
    for i in range(200):
        policy(f"{'a' * 200}{i}", (64, 64))
    assert time.perf_counter() - started < SECONDS


def test_formulas_larger_than_any_sum_are_refused():
    terms = "+".join(f"{i}*clip" for i in range(1, MAX_TERMS + 2))
    for text, said in (
        ("c" * (MAX_FORMULA + 1), f"at most {MAX_FORMULA}"),
        (terms, f"{MAX_TERMS + 1} terms"),
        (terms.rpartition("+")[0], "'clip' twice"),
    ):
        with pytest.raises(ValueError, match="formula=") as error:
            recipe_of(text)
        assert said in str(error.value) and len(str(error.value)) < 300


def test_a_schedule_of_a_thousand_steps_that_was_calibrated_and_edited_is_read():
    sigmas = [1 - i / 1000 for i in range(1001)]
    column = [1 + i / 7919 for i in range(1000)]
    provenance = {
        "source": "calibration",
        "model": {"source": "m" * 200, "format": "nf4", "source_hash": "0" * 64},
        "sampling": {"sigmas": sigmas, "cfg": 1.0, "negative": "blurry, [ugly], " * 20},
        "prompts": {"calibration": {"count": 64, "seeds": list(range(2**40, 2**40 + 64))}},
        "precheck": {"steps": column, "error": column},
        "best": {"c_x": column, "c_eps": column},
    }
    made = scalar_schedule(sigmas, column, column, "euler", True, provenance)
    for i in range(200):
        made = made.edited({"c_x": 0.001}, i + 1)
    assert QSchedule.from_json(made.to_json()) == made


def test_what_can_be_made_can_be_read():
    """The bounds of the parts and of the whole leave no schedule that is written and refused."""
    whole = {"a": [1] * (MAX_PARTS - 4010)}
    made = scalar_schedule(
        [1 - i / 1000 for i in range(1001)], [1] * 1000, [1] * 1000, provenance=whole
    )
    assert QSchedule.from_json(made.to_json()) == made
    with pytest.raises(ScheduleError, match="brackets and commas"):
        scalar_schedule((1.0, 0.0), (1.0,), (1.0,), provenance={"a": [1] * MAX_PARTS})


def test_a_number_of_many_digits_is_named():
    with pytest.raises(ScheduleError, match="has 4000 digits"):
        QSchedule.from_json(f'{{"format": {"9" * 4000}}}')


def test_two_large_lists_of_prompts_are_compared_at_once():
    many = [f"prompt {i}" for i in range(20_000)]
    started = time.perf_counter()
    CalibrationPrompts.of(many, [f"{prompt} held out" for prompt in many])
    assert time.perf_counter() - started < 2 * SECONDS
