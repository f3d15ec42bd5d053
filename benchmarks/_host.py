"""ComfyUI and the pack in one process, without a server."""

from __future__ import annotations

import importlib
import os
import sys
import types
from contextlib import suppress
from pathlib import Path
from types import ModuleType

PACK = "qsched_pack"


def import_pack(cpu: bool = True) -> ModuleType:
    """nodes/host/weights/loading.py, with the pack as the package ``qsched_pack``.

    ComfyUI is on the CPU, or on the device that it would choose itself.

    ComfyUI comes from ``COMFYUI_PATH``.  Its folder goes first on ``sys.path``: both it and the
    pack have something named ``nodes``.
    """
    if os.environ["COMFYUI_PATH"] not in sys.path[:1]:
        sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if not cpu:  # as ComfyUI's main.py: the other modules of comfy-aimdo look for it on import
        with suppress(ImportError):
            importlib.import_module("comfy_aimdo.control").init()
    importlib.import_module("comfy.cli_args").args.cpu = cpu
    root = Path(__file__).resolve().parents[1]
    for name, folder in ((PACK, root), (f"{PACK}.nodes", root / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)
    return importlib.import_module(f"{PACK}.nodes.host.weights.loading")
