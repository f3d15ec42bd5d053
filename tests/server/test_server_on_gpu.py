"""The files of this folder that depend on the device, once more on a GPU: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("server", "sampling", "schedules", "saving", "calibration", "evaluate_node", "objectives")


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", FILES)
def test_on_cuda(file):
    path = Path(__file__).with_name(f"test_{file}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-q", "--full", "-p", "no:cacheprovider"],
        env=os.environ | {"QSCHED_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
