"""Runs loading_scenarios.py with the real ComfyUI in a process of its own, a test a scenario.

There ComfyUI's folder stands on ``sys.path`` and the pack is a package, as in a real server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCENARIOS = Path(__file__).with_name("loading_scenarios.py")
NAMES = [
    line[len("def ") : line.index("(")]
    for line in SCENARIOS.read_text(encoding="utf-8").splitlines()
    if line.startswith("def test_")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[str]]:
    """What went wrong in each scenario, by its name."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    report = tmp_path_factory.mktemp("loading") / "report.xml"
    environment = os.environ | {"PYTHONPATH": str(comfyui), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", str(SCENARIOS), "-q", "--noconftest", "-c", os.devnull,
            "--rootdir", str(SCENARIOS.parent), "--import-mode=importlib",
            "-p", "no:cacheprovider", f"--junitxml={report}",
        ],
        cwd=report.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    if not report.exists():
        pytest.fail(f"the scenarios did not run:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = found.setdefault(case.get("name", "").partition("[")[0], [])
        wrong += [
            f"{case.get('name')}\n{part.text}"
            for part in case
            if part.tag in ("failure", "error", "skipped")
        ]
    assert set(found) >= set(NAMES), run.stdout[-4000:]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_loading(name, results):
    assert not results[name], "\n".join(results[name])
