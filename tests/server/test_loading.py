"""Quantized loading, saving and text encoders inside the real ComfyUI, a test a scenario."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_runner import names, run

FILES = (
    "golden_scenarios.py",
    "loading_scenarios.py",
    "hook_scenarios.py",
    "saving_scenarios.py",
    "text_scenarios.py",
)
HERE = Path(__file__).parent
CASES = [
    pytest.param(file, name, device, marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for file in FILES
    for name in names(HERE / file)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What went wrong, by file and device; each runs once, when it is first asked for."""
    done = {}

    def ask(file: str, device: str) -> dict[str, list[str]]:
        if (file, device) not in done:
            folder = tmp_path_factory.mktemp("scenarios")
            done[file, device] = run(HERE / file, folder, QSCHED_TEST_DEVICE=device)
        return done[file, device]

    return ask


@pytest.mark.parametrize(("file", "name", "device"), CASES)
def test_scenario(file, name, device, results):
    wrong = results(file, device)[name]
    assert not wrong, "\n".join(wrong)
