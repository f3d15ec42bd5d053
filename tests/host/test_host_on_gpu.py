"""The files of this folder that depend on the device, once more on a GPU: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("golden", "hooks", "loading", "saving", "text")


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("file", FILES)
def test_on_cuda(file):
    path = Path(__file__).with_name(f"test_host_{file}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-q", "--full", "-p", "no:cacheprovider"],
        env=os.environ | {"QSCHED_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
