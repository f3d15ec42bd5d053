"""Prompt sets: reproducible seeds, no leak from calibration to held-out, clear errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.prompts import (
    CalibrationPrompts,
    PromptError,
    PromptSet,
    bundled_prompts,
    categories,
    parse_prompts,
    read_prompts,
)

seeds = st.integers(0, 2**53)
counts = st.integers(1, 40)


@given(seeds, counts, counts)
def test_no_seed_is_used_twice(seed, calibration, heldout):
    prompts = CalibrationPrompts.of(
        [f"c{i}" for i in range(calibration)], [f"h{i}" for i in range(heldout)], seed
    )
    every = prompts.calibration.seeds + prompts.heldout.seeds
    assert len(set(every)) == calibration + heldout
    # stochastic solvers draw from the next seed
    assert not {s + 1 for s in every} & set(every)
    assert max(every) < 2**53


@given(seeds, counts, st.integers(0, 10))
def test_adding_prompts_leaves_the_others_seeds(seed, count, more):
    names = [f"p{i}" for i in range(count + more)]
    short = CalibrationPrompts.of(names[:count], ["h"], seed)
    long = CalibrationPrompts.of(names, ["h"], seed)
    assert long.calibration.seeds[:count] == short.calibration.seeds
    assert long.heldout == short.heldout


def test_the_bundled_set_is_whole_and_does_not_leak():
    prompts = bundled_prompts()
    assert (len(prompts.calibration), len(prompts.heldout)) == (20, 64)
    every = prompts.calibration.prompts + prompts.heldout.prompts
    assert len({prompt.lower() for prompt in every}) == 84
    assert bundled_prompts(0) == prompts
    assert bundled_prompts(1).calibration.seeds != prompts.calibration.seeds


def test_lines_are_prompts_but_for_blanks_and_comments():
    text = "\n  a cat  \n# a comment\n\r\n\ta dog # with a hash\n   #x\n"
    assert parse_prompts(text) == ("a cat", "a dog # with a hash")


@pytest.mark.parametrize("text", ["", "  \n\n", "# only\n#comments"])
def test_text_without_prompts_is_told(text):
    with pytest.raises(PromptError, match="heldout has no prompts"):
        parse_prompts(text, "heldout")


def test_a_repeated_line_is_told():
    with pytest.raises(PromptError, match="'a cat' twice"):
        parse_prompts("a cat\na cat")
    assert parse_prompts("a cat\na cat", distinct=False) == ("a cat", "a cat")


def test_a_prompt_may_not_be_in_both_sets():
    with pytest.raises(PromptError, match=r"held-out prompt 'b' is a calibration prompt"):
        CalibrationPrompts.of(["a", "b"], ["b"], 0)
    with pytest.raises(PromptError, match="seed 5 is in the calibration and in the held-out"):
        CalibrationPrompts(PromptSet(("a",), (5,)), PromptSet(("b",), (5,)))
    with pytest.raises(PromptError, match="held-out prompts are empty"):
        CalibrationPrompts.of(["a"], [])


@pytest.mark.parametrize(
    "prompts,seeds,reason",
    [
        ((), (), "empty"),
        (("a",), (1, 2), "1 prompts but 2 seeds"),
        (("a", " "), (1, 2), r"prompts\[1\]=' '"),
        (("a", 3), (1, 2), r"prompts\[1\]=3"),
        (("a",), (-1,), r"seeds\[0\]=-1"),
        (("a",), (True,), r"seeds\[0\]=True"),
        (("a",), (2**64,), r"seeds\[0\]"),
    ],
)
def test_an_invalid_set_is_told(prompts, seeds, reason):
    with pytest.raises(PromptError, match=reason):
        PromptSet(prompts, seeds)


def test_the_hash_depends_on_prompts_seeds_and_order():
    one = PromptSet(("a", "b"), (1, 2))
    others = [
        PromptSet(("a", "c"), (1, 2)),
        PromptSet(("a", "b"), (1, 3)),
        PromptSet(("b", "a"), (2, 1)),
        PromptSet(("ab",), (12,)),
    ]
    assert one.hash == PromptSet(["a", "b"], [1, 2]).hash
    assert len({one.hash, *(other.hash for other in others)}) == 5
    assert one.part(1, 9) == PromptSet(("b",), (2,))


def test_a_json_list_is_a_list_of_prompts():
    assert parse_prompts('["a cat", " a dog ", "# no"]') == ("a cat", "a dog")
    assert parse_prompts("[photo] a cat\n[1, 2") == ("[photo] a cat", "[1, 2")
    with pytest.raises(PromptError, match="twice"):
        parse_prompts('["a cat", "a cat"]')


def test_categories_choose_from_the_bundled_prompts():
    everything = bundled_prompts(3)
    names = categories()
    people = bundled_prompts(3, names[:1])
    assert set(people.calibration.prompts) < set(everything.calibration.prompts)
    parts = [bundled_prompts(3, [name]) for name in names]
    assert sum(len(part.heldout) for part in parts) == len(everything.heldout)
    with pytest.raises(PromptError, match="categories has 'weather'"):
        bundled_prompts(3, ["weather"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "one\ntwo", r"a\.txt has no line \[heldout\]"),
        ("a.txt", "[heldout]\ntwo", r"a\.txt, calibration has no prompts"),
        ("a.json", "{", r"a\.json must be JSON"),
        ("a.json", '{"calibration": ["a"]}', "heldout"),
        ("a.json", '{"calibration": ["a"], "heldout": [1]}', "must hold text"),
        ("a.json", "[" * 100_000, "must be JSON"),
    ],
)
def test_prompt_files_that_are_none_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=says):
        read_prompts(tmp_path / name)


def test_a_prompt_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="not text in UTF-8"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(PromptError, match=r"none\.txt can't be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "use",
    [
        lambda odd: parse_prompts(f"a circle\n{odd}"),
        lambda odd: parse_prompts(json.dumps(["a circle", odd]), distinct=False),
        lambda odd: CalibrationPrompts.of(["a circle"], [odd]),
        lambda odd: PromptSet((odd,), (1,)),
    ],
)
def test_half_of_a_letter_is_refused_before_a_tokenizer_sees_it(use):
    with pytest.raises(PromptError, match=r"a \\ud800 b.*remove") as error:
        use("a \ud800 b")
    assert str(error.value).isprintable()
