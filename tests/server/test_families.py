"""Model families inside the real ComfyUI, a test a scenario of family_scenarios.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_runner import names, run

SCENARIOS = Path(__file__).with_name("family_scenarios.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[str]]:
    """What went wrong in each scenario, by its name."""
    return run(SCENARIOS, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", names(SCENARIOS))
def test_family(name, results):
    assert not results[name], "\n".join(results[name])
