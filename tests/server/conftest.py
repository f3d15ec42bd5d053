"""A real ComfyUI, with the pack linked in, for every test of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.build import build_models
from devtools.server import ComfyServer, device_args


@pytest.fixture(scope="session")
def comfyui_path(repo_root) -> Path:
    """The ComfyUI folder: ``COMFYUI_PATH``, or the one ``dev.py`` installed."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named) if named else repo_root / ".host" / "ComfyUI-0.30.0"
    if not (path / "main.py").is_file():
        pytest.fail(f"no ComfyUI at {path}; run the tests with: python dev.py test", pytrace=False)
    return path.resolve()


@pytest.fixture(scope="session")
def demo_models(repo_root) -> Path:
    """A models folder with the demo's checkpoint and scorer, built once and kept."""
    models = repo_root / ".host" / "cache" / "models"
    build_models(models)
    return models


@pytest.fixture(scope="session")
def demo_checkpoint(demo_models) -> Path:
    return demo_models / "checkpoints" / "qsched_demo.safetensors"


@pytest.fixture(scope="session")
def server_base(tmp_path_factory, demo_models) -> Path:
    """A fresh base directory of a server, with the demo's models in it."""
    base = tmp_path_factory.mktemp("comfyui")
    for source in demo_models.rglob("*.safetensors"):
        target = base / "models" / source.relative_to(demo_models)
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(source, target)
    return base


def _place(source: Path, target: Path) -> None:
    """Hard link, symbolic link or copy: whatever this file system grants, cheapest first."""
    try:
        os.link(source, target)
    except OSError:
        import shutil

        shutil.copyfile(source, target)


@pytest.fixture(scope="session")
def server(comfyui_path, server_base) -> Iterator[ComfyServer]:
    """One running ComfyUI for the whole session."""
    with ComfyServer(comfyui_path, server_base, extra_args=device_args()) as running:
        yield running
