"""A real ComfyUI, with the pack linked in, for every test of this folder."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from device import SERVER_ARGS
from filelock import FileLock
from hostpath import comfyui_folder

from demo.build import build_models
from devtools import imports
from devtools.server import ComfyServer


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI folder."""
    return comfyui_folder()


@pytest.fixture(scope="session")
def demo_models(repo_root) -> Path:
    """A models folder with the demo's checkpoint and scorer, built once and kept."""
    models = repo_root / ".host" / "cache" / "models"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models.with_suffix(".lock")):  # two lanes of tests begin at once
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
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@pytest.fixture(scope="session")
def server_args() -> tuple[str, ...]:
    """How every server here is started: see device.py."""
    return SERVER_ARGS


@pytest.fixture(scope="session")
def server(comfyui_path, server_base, server_args) -> Iterator[ComfyServer]:
    """One running ComfyUI for the whole session; its log says who imported what."""
    with ComfyServer(
        comfyui_path, server_base, extra_args=server_args, environment=imports.VARIABLE
    ) as running:
        yield running


@pytest.fixture(scope="session")
def comfy_in_process(comfyui_path) -> None:
    """ComfyUI's modules can be imported in this process, and run on the CPU."""
    sys.path.insert(0, str(comfyui_path))
    importlib.import_module("comfy.cli_args").args.cpu = True


@pytest.fixture(scope="session")
def demo_prompt() -> Callable[..., dict]:
    """An API prompt that draws with the demo model and core nodes alone; 7 saves the pictures."""

    def make(text: str, seed: int = 0, steps: int = 4, batch: int = 1) -> dict:
        nodes = {
            "1": ("CheckpointLoaderSimple", {"ckpt_name": "qsched_demo.safetensors"}),
            "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": text}),
            "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
            "4": ("EmptySD3LatentImage", {"width": 96, "height": 96, "batch_size": batch}),
            "5": (
                "KSampler",
                {
                    "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0],
                    "latent_image": ["4", 0], "seed": seed, "steps": steps, "cfg": 1.0,
                    "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                },
            ),
            "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
            "7": ("SaveImage", {"images": ["6", 0], "filename_prefix": "demo"}),
        }  # fmt: skip
        return {k: {"class_type": name, "inputs": inputs} for k, (name, inputs) in nodes.items()}

    return make
