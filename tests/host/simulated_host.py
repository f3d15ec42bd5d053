"""ComfyUI as if on a GPU of 24 GB that is not there: see tests/simulated_gpu.py.

ComfyUI moves models, latents and text to it and back, and so does the pack.  What was left on the
other side raises as it does on CUDA.  Formats that need a kernel of some GPU are not to be had on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from simulated_gpu import GPU, simulated_gpu

TOTAL, FREE = 24e9, 20e9
NAME = "NVIDIA GPU, simulated"


def _facts() -> dict[str, object]:
    """What ComfyUI asks torch.cuda about a GPU."""
    properties = SimpleNamespace(name=NAME, major=8, minor=6, total_memory=int(TOTAL))
    return {
        "current_device": lambda: GPU.index,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
    }


@contextmanager
def simulated_host() -> Iterator[torch.device]:
    """Inside, ComfyUI computes on ``cuda:0`` and keeps on the CPU what it has no use for."""
    management = importlib.import_module("comfy.model_management")

    def free(device=None, torch_free_too: bool = False):
        return (FREE, FREE) if torch_free_too else FREE

    def total(device=None, torch_total_too: bool = False):
        return (TOTAL, TOTAL) if torch_total_too else TOTAL

    ours = {
        "cpu_state": management.CPUState.GPU,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "current_loaded_models": [],
        "get_torch_device": lambda: GPU,
        "get_free_memory": free,
        "get_total_memory": total,
        "soft_empty_cache": lambda *_: None,
    }
    with ExitStack() as stack, simulated_gpu() as device:
        for name, value in ours.items():
            stack.enter_context(patch.object(management, name, value))
        for name, value in _facts().items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        yield device
