"""The sampler in many kinds of graphs inside the real ComfyUI, a test a scenario."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_runner import names, run

SCENARIOS = Path(__file__).with_name("sampling_scenarios.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[str]]:
    """What went wrong in each scenario, by its name."""
    return run(SCENARIOS, tmp_path_factory.mktemp("sampling"))


@pytest.mark.parametrize("name", names(SCENARIOS))
def test_sampling(name, results):
    assert not results[name], "\n".join(results[name])
