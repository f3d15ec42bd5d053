"""The files of this folder that depend on the device, once more on a GPU: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REAL = ("dynamic", "golden", "hooks", "loading", "saving", "text")
SIMULATED = ("golden", "loading", "saving", "text", "sources", "encoders")


def run(file: str, device: str, *more: str) -> None:
    path = Path(__file__).with_name(f"test_host_{file}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider", *more],
        env=os.environ | {"QSCHED_TEST_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("file", REAL)
def test_on_cuda(file):
    run(file, "cuda", "--full")


@pytest.mark.full
@pytest.mark.parametrize("file", SIMULATED)
def test_as_if_on_cuda(file):
    """See tests/simulated_gpu.py."""
    run(file, "simulated")
