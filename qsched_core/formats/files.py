"""A weight file's tensors, mapped rather than read, and whether they are quantized already."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ..text import shown
from .base import FormatError
from .header import Entry, header_of

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPES = {k: getattr(torch, name) for k, name in TORCH_NAMES.items() if hasattr(torch, name)}
FULL_PRECISION = ("F64", "F32", "F16", "BF16")
# Endings of tensor names that only quantized files have, and whose they are.
MARKERS = {
    ".comfy_quant": "ComfyUI",
    "scaled_fp8": "ComfyUI (scaled fp8)",
    ".scale_weight": "ComfyUI (scaled fp8)",
    ".weight_scale": "a quantizer",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ, AWQ or SVDQuant",
}


class MappedFile:
    """A safetensors file whose tensors lie in a read-only mapping of it.

    Nothing is read before it is used; ``release`` gives the pages of a tensor that is done with
    back to the system.  The mapping lives as long as any of its tensors does.  Errors are those of
    :func:`read_header`, and FormatError for a dtype that torch does not have.
    """

    def __init__(self, path: str | Path):
        self._name = Path(path).name
        with open(path, "rb") as file:
            header = header_of(file, self._name)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.entries, self.metadata, self._data = header.tensors, header.metadata, header.data
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = self._bytes.data_ptr()
        self._end = self._start + self._bytes.numel()

    def tensor(self, key: str) -> torch.Tensor:
        """Tensor ``key``: a view of the mapping, not to be written to."""
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise FormatError(
                f"{self._name}: tensor {shown(key)} has the dtype {entry.dtype}, unknown to torch"
            )
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        offset = self._data + entry.start
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        raw = self._bytes[offset : offset + count * dtype.itemsize]
        if offset % dtype.itemsize:  # legal in a safetensors file, not in every kernel
            raw = raw.clone()
        return raw.view(dtype).reshape(entry.shape)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {key: self.tensor(key) for key in self.entries}

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of the mapping, and so takes no memory of its own."""
        return tensor.device.type == "cpu" and self._start <= tensor.data_ptr() < self._end

    def release(self, tensor: torch.Tensor) -> None:
        """Give the memory of ``tensor`` back, if it is a view of the mapping; it can be read again."""
        if not self.owns(tensor) or not hasattr(self._map, "madvise"):
            return
        page, start = mmap.PAGESIZE, tensor.data_ptr() - self._start
        first = -(-start // page) * page
        last = min(start + tensor.numel() * tensor.element_size(), len(self._map)) // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def check_unquantized(
    tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None, name: str
) -> None:
    """FormatError if the diffusion model's ``tensors`` (its keys only) are quantized already."""
    advice = "open it with ComfyUI's own loader, or give the fp16 or bf16 file"
    if "_quantization_metadata" in (metadata or {}):
        raise FormatError(f"{name} is quantized already (by ComfyUI, says its metadata); {advice}")
    for key, entry in tensors.items():
        for marker, owner in MARKERS.items():
            if key.endswith(marker):
                raise FormatError(f"{name} is quantized already (by {owner}: {key}); {advice}")
        if entry.dtype.startswith("F8"):
            raise FormatError(
                f"{name} has fp8 weights ({key}); quantizing them again would lose twice: {advice}"
            )
        matrix = key.endswith(".weight") and len(entry.shape) >= 2
        if matrix and entry.dtype not in FULL_PRECISION:
            raise FormatError(f"{name} is quantized already ({key} is {entry.dtype}); {advice}")
