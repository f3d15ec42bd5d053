"""What every test shares: the repo root on sys.path, the gpu marker, hypothesis' profile."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # Without any, each server of these tests compiles torch anew, as this process does: see
    # devtools/environment.py, whose place it is.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(sys.prefix) / "pycache")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # Last, so that ComfyUI's own `nodes` and `utils` win in tests that import it.
    sys.path.append(str(ROOT))

settings.register_profile("qsched", deadline=None)
settings.load_profile("qsched")


def _why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"needs a CUDA device, and torch cannot be imported: {error}"
    return None if torch.cuda.is_available() else "needs a CUDA device; torch sees none"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT
