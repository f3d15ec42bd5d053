"""Presets of a search."""

from __future__ import annotations

import pytest

from qsched_core.search import CalibrationSettings
from qsched_core.search.presets import OWN, PRESETS, chosen
from qsched_core.study.errors import CalibrationError


def test_without_a_preset_a_workflow_means_what_it_says():
    for strategy, budget in (("grid", 16), ("gp", 0), ("cmaes", 40)):
        assert chosen(OWN, strategy, budget) == (strategy, budget)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != OWN])
def test_every_other_is_a_search_whose_summary_tells_its_size(name):
    strategy, budget = chosen(name, "grid", 16)
    settings = CalibrationSettings(strategy=strategy, budget=budget)
    assert PRESETS[name].summary.startswith(f"{settings.budget} candidates")


def test_quick_is_less_than_normal_and_thorough_more():
    budgets = [
        CalibrationSettings(strategy=s, budget=b).budget
        for s, b in (chosen(name, "gp", 0) for name in ("quick", "normal", "thorough"))
    ]
    assert budgets == sorted(set(budgets))


def test_another_is_refused_with_those_there_are():
    with pytest.raises(CalibrationError, match=r"preset='fast' .* quick, normal, thorough"):
        chosen("fast", "gp", 0)
