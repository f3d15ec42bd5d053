"""A weight file's tensors, mapped rather than read, and whether they are quantized already."""

from __future__ import annotations

import math
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

    Touching the mapping of a file that was cut short kills the process: where the file may have
    changed, long after it was opened, ``read`` is for that, and fails instead.
    """

    def __init__(self, path: str | Path):
        self._name = Path(path).name
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as this is
        self._closing = weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()  # of the place in the file
        header = header_of(self._file, self._name)
        self._known = self._facts()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
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

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor``, a view of the mapping, that is read from the file as it was opened.

        FormatError if the file was changed since, or can't be read; one that was only renamed,
        replaced or deleted is still there.
        """
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0
        data = torch.empty(extent, dtype=tensor.dtype)
        with self._lock, self._named():
            self._check_same()
            self._file.seek(tensor.data_ptr() - self._start if extent else 0)
            self._fill(memoryview(data.view(torch.uint8).numpy()))
            self._check_same()
        return torch.as_strided(data, tensor.shape, tensor.stride())

    def check_same(self) -> None:
        """FormatError if the file was changed since it was opened: ask before touching the mapping."""
        with self._named():
            self._check_same()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FormatError(
                f"{self._name} can't be read any more ({error.strerror}); see whether its drive is "
                "connected, and load it again"
            ) from error

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._file.readinto(view)
            if not count:
                raise self._changed()
            view = view[count:]

    def _facts(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _check_same(self) -> None:
        if self._facts() != self._known:
            raise self._changed()

    def _changed(self) -> FormatError:
        return FormatError(
            f"{self._name} was changed on disk since it was loaded ({self._known[0]} bytes then, "
            f"{self._facts()[0]} now); load it again, and replace a file by renaming another to it"
        )

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
