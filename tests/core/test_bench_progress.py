"""The share of a run in which its bar moves and its part is named, of runs that are made up."""

from __future__ import annotations

import pytest

from benchmarks.progress import Heard, Run


def run(moves=(), said=(), seconds=100.0) -> Run:
    bars = [Heard(at, share=at / seconds) for at in moves]
    return Run(seconds, (*bars, *(Heard(at, text=text) for at, text in said)))


def test_a_bar_that_moves_all_the_time_moves_all_the_time():
    steady = run([0.001, *range(1, 100)], [(0.0, "search")])
    assert steady.moving() == pytest.approx(100, abs=0.01)
    assert run([0.001, *range(1, 100)]).moving() == 0  # nothing says what is done


def test_what_is_slower_than_the_patience_stands():
    slow = run([0.5, 50.0], [(0.0, "search"), (40.0, "check")])
    assert slow.moving() == pytest.approx(4)
    assert slow.standing() == [(0.0, 0.5, "search"), (2.5, 50.0, "search"), (52.0, 100.0, "check")]
    assert slow.moving(patience=60) == pytest.approx(99.5)


def test_time_before_the_first_text_does_not_count():
    late = run([0.001, *range(1, 100)], [(30.0, "search")])
    assert late.moving() == pytest.approx(70, abs=0.01)


def test_a_bar_that_is_told_the_same_again_or_falls_does_not_move():
    heard = (Heard(0.0, text="search"), *(Heard(float(t), share=0.5) for t in range(100)))
    assert Run(100.0, heard).moves == [0.0]
    assert Run(100.0, (*heard, Heard(99.5, share=0.4))).moves == [0.0]
