"""How the tests themselves are run: what a quick run leaves out is said, and lanes share nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
INI = "[pytest]\nmarkers =\n    full: slow\n    gpu: a GPU\n"
LANES = ("-n", "2", "--dist", "loadscope")
SOME = """
import os
import pytest

@pytest.fixture(scope="session")
def server(tmp_path_factory):
    return os.getpid()

@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.full)])
def test_case(case):
    pass

@pytest.mark.full
def test_slow():
    pass

@pytest.mark.parametrize("case", range(12))
def test_with_the_server(case, server, request):
    seen = request.config.rootpath / "servers"
    with open(seen, "a") as file:
        file.write(f"{server}\\n")
"""


@pytest.fixture
def suite(tmp_path):
    """Runs a small suite with the conftest of this one: its exit code and output."""
    (tmp_path / "pytest.ini").write_text(INI, encoding="utf-8")
    (tmp_path / "tests" / "server").mkdir(parents=True)
    shutil.copy(CONFTEST, tmp_path / "tests")
    for name in ("one", "two"):
        path = tmp_path / "tests" / "server" / f"test_{name}.py"
        path.write_text(SOME, encoding="utf-8")

    def run(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests", "-p", "no:cacheprovider", *options],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("lanes", [(), LANES], ids=["one lane", "two lanes"])
def test_what_a_quick_run_leaves_out_is_said_at_its_end(suite, lanes):
    last = suite(*lanes).partition(" left out ")[2].splitlines()[1:]
    assert [line.split() for line in last[:2]] == [
        ["2", "of", "test_one.py"],
        ["2", "of", "test_two.py"],
    ]
    assert last[2].split()[0] == "4" and "--full runs them too" in last[2]
    assert "26 passed" in last[-1] and len(last) < 6
    whole = suite("--full", *lanes)
    assert "30 passed" in whole and "left out" not in whole


def test_all_of_the_servers_tests_are_in_one_lane(suite):
    suite(*LANES)
    assert len(set((suite.folder / "servers").read_text().split())) == 1
