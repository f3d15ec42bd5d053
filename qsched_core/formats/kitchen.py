"""What the formats on comfy-kitchen's kernels share: devices, backends, rotation, int4 codes."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from types import ModuleType

import torch

from ..devices import Place, place
from ..optional import missing, require
from .base import WeightFormat

ROTATIONS = (256, 64, 16, 4)  # sizes of the regular Hadamard matrices that ConvRot may use
INT4_MAX = 7


def kitchen(feature: str) -> ModuleType:
    """comfy_kitchen; MissingDependencyError names ``feature``."""
    return require("comfy_kitchen", feature, "comfy-kitchen")


def backend(function: str, at: Place) -> str | None:
    """The backend that comfy-kitchen's registry picks for ``function``; None if none serves ``at``.

    "eager" is plain torch.  ComfyUI switches "cuda" off where torch is built for CUDA 12.
    """
    registry = kitchen("this format").registry
    known = registry.list_backends()
    device = "cuda" if at.type == "rocm" else at.type
    for name in getattr(registry, "_priority", ("cuda", "triton", "eager")):
        found = known.get(name)
        if not found or not found["available"] or found["disabled"]:
            continue
        if function not in found["capabilities"]:
            continue
        limits = registry.get_constraints(name, function)
        least = limits and limits.min_compute_capability
        if limits and device not in limits.default_devices:
            continue
        if least and not at.at_least(*least):
            continue
        return name
    return None


class KitchenFormat(WeightFormat):
    """A format whose arithmetic depends on the GPU; ``refusal`` says where it can't run."""

    low_bit_activations = True

    @abstractmethod
    def refusal(self, at: Place) -> str | None:
        """Why this format can't run at ``at`` (and what would run instead), or None."""

    @abstractmethod
    def _product(self, tokens, packed, bias) -> torch.Tensor:
        """tokens [rows, in] times the weight's transpose, plus bias [out]; there are some rows."""

    def available(self, device):
        return self.refusal(place(device))

    def unfit_columns(self, columns: int, size: int) -> str | None:
        """Why a weight of so many in features can't be cut into groups of ``size``, or None."""
        return (
            f"{self.name} needs in features that are a multiple of {size}"
            if columns % size
            else None
        )

    def before_sm80(self, at: Place) -> str | None:
        """The refusal of a kernel for GPUs from sm_80 on, and for the CPU."""
        if at.type == "cpu" or at.at_least(8, 0):
            return None
        return (
            f"{self.name} needs an sm_80 or newer GPU or the CPU; found {at}; nothing would run "
            "instead: choose nf4"
        )

    def linear(self, x, packed, bias=None, weight_only=False):
        if weight_only:
            return super().linear(x, packed, bias, weight_only)
        tokens = x.reshape(-1, packed.shape[1])
        if len(tokens):
            out = self._product(tokens, packed, bias)
        else:
            out = x.new_empty(0, packed.shape[0])
        return out.reshape(*x.shape[:-1], packed.shape[0])

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the GPU that ``x`` is on has the kernels."""
        return x.is_cuda and _serves(self, x.device)


@lru_cache(maxsize=64)
def _serves(form: KitchenFormat, device: torch.device) -> bool:
    installed = missing("comfy_kitchen", form.name, "comfy-kitchen") is None
    return installed and form.refusal(place(device)) is None


def rotation_size(columns: int) -> int | None:
    """The largest rotation that divides ``columns``, or None."""
    return next((size for size in ROTATIONS if columns % size == 0), None)


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The regular Hadamard matrix of a power of 4, orthonormal and symmetric (ConvRot).

    Every row sums to the same, so that no channel gathers a group's mean.
    """
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    whole = torch.ones(1, 1)
    while whole.shape[0] < size:
        whole = torch.kron(whole, four)
    return (whole / size**0.5).to(device, dtype)


def rotate(rows: torch.Tensor, size: int) -> torch.Tensor:
    """rows [rows, features] with each ``size`` features rotated; twice is the identity."""
    if size == 256 and rows.dtype == torch.float32 and rows.device.type == "cpu":
        # The Kronecker product of two matrices of 16: an eighth of the work, in other sums.
        matrix = hadamard(16, rows.device, rows.dtype)
        inner = rows.reshape(-1, 16) @ matrix
        return torch.matmul(matrix, inner.view(-1, 16, 16)).view(rows.shape)
    matrix = hadamard(size, rows.device, rows.dtype)
    return (rows.reshape(-1, size) @ matrix).view(rows.shape)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., n] in [-8, 7] as int8 [..., n / 2], the first of two in the low half."""
    codes = codes.to(torch.int8)
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_int4(data: torch.Tensor) -> torch.Tensor:
    """The codes (int8) that ``pack_int4`` put into ``data``."""
    low = (data << 4) >> 4  # shifts keep the sign
    return torch.stack((low, data >> 4), -1).flatten(-2)
