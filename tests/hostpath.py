"""Which ComfyUI the tests run in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def comfyui_folder() -> Path:
    """``COMFYUI_PATH``, or the folder that ``dev.py`` installed."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named) if named else ROOT / ".host" / "ComfyUI-0.30.0"
    if not (path / "main.py").is_file():
        raise pytest.UsageError(f"no ComfyUI at {path}; run the tests with: python dev.py test")
    return path.resolve()
