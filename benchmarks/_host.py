"""ComfyUI and the pack in one process, without a server."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

PACK = "qsched_pack"


def import_pack(cpu: bool = True) -> ModuleType:
    """nodes/host/weights/loading.py, with the pack as the package ``qsched_pack``.

    ComfyUI is on the CPU, or on the device that it would choose itself.

    ComfyUI comes from ``COMFYUI_PATH``.  Its folder goes first on ``sys.path``: both it and the
    pack have something named ``nodes``.
    """
    if os.environ["COMFYUI_PATH"] not in sys.path[:1]:
        sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if not cpu:
        with suppress(ImportError):
            prepare_dynamic_loading()
    importlib.import_module("comfy.cli_args").args.cpu = cpu
    root = Path(__file__).resolve().parents[1]
    for name, folder in ((PACK, root), (f"{PACK}.nodes", root / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)
    return importlib.import_module(f"{PACK}.nodes.host.weights.loading")


def prepare_dynamic_loading() -> None:
    """As ComfyUI's main.py, before ComfyUI: the rest of comfy-aimdo looks for it on import."""
    importlib.import_module("comfy_aimdo.control").init()


def can_load_dynamically() -> bool:
    """Whether comfy-aimdo runs here, on the first GPU."""
    control = importlib.import_module("comfy_aimdo.control")
    return control.lib is not None and bool(control.devctxs or control.init_devices([0]))


@contextmanager
def loading_dynamically(on: bool = True) -> Iterator[None]:
    """Inside, ComfyUI loads as its main.py has it load on NVIDIA GPUs, or, not ``on``, whole models."""
    patchers = importlib.import_module("comfy.model_patcher")
    memory = importlib.import_module("comfy.memory_management")
    loads = patchers.ModelPatcherDynamic if on else patchers.ModelPatcher
    with (
        patch.object(patchers, "CoreModelPatcher", loads),
        patch.object(memory, "aimdo_enabled", on),
    ):
        yield
