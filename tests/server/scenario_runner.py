"""Runs a file of scenarios with the real ComfyUI, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPO = Path(__file__).resolve().parents[2]


def names(scenarios: Path) -> list[str]:
    """The scenarios' names, read without importing them: ComfyUI is not importable here."""
    return [
        line[len("def ") : line.index("(")]
        for line in scenarios.read_text(encoding="utf-8").splitlines()
        if line.startswith("def test_")
    ]


def run(
    scenarios: Path, folder: Path, timeout: float = 1800, **variables: str
) -> dict[str, list[str]]:
    """What went wrong in each scenario, by its name; an empty list where nothing did.

    ComfyUI's folder stands first on ``sys.path`` there, as in a real server; ``variables`` are more
    environment variables.
    """
    report = folder / "report.xml"
    paths = (os.environ["COMFYUI_PATH"], str(REPO), str(scenarios.parent))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        **variables,
    }
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", str(scenarios), "-q", "--noconftest", "-c", os.devnull,
            "--rootdir", str(scenarios.parent), "--import-mode=importlib",
            "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder / 'scenarios'}",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
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
    assert set(found) >= set(names(scenarios)), run.stdout[-4000:]
    return found
