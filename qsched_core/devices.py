"""Devices as kernels see them: what can run where."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

FORCE_INT8 = "COMFY_KITCHEN_FORCE_INT4_INT8_FALLBACK"  # comfy-kitchen's own variable


@dataclass(frozen=True)
class Place:
    """A device as kernels see it.

    ``type`` is torch's name of it ("rocm" for AMD's), ``capability`` an NVIDIA GPU's.
    ``forced_int8``: comfy-kitchen was told to multiply int4 as int8.
    """

    type: str
    capability: tuple[int, int] | None = None
    forced_int8: bool = False

    def at_least(self, major: int, minor: int) -> bool:
        """Whether this is an NVIDIA GPU of that compute capability or a later one."""
        return self.capability is not None and self.capability >= (major, minor)

    def __str__(self) -> str:
        if self.type != "cuda":
            return self.type
        if self.capability is None:
            return "cuda without a GPU"
        return "cuda sm_{}{}".format(*self.capability)


def place(device: torch.device | str) -> Place:
    """What ``device`` is on this machine."""
    device = torch.device(device)
    if device.type != "cuda":
        return Place(device.type)
    if torch.version.hip is not None:
        return Place("rocm")
    if not torch.cuda.is_available():
        return Place("cuda")
    forced = os.environ.get(FORCE_INT8, "0") == "1"
    return Place("cuda", torch.cuda.get_device_capability(device), forced)
