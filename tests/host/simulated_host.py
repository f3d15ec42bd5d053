"""ComfyUI as if on a GPU of 24 GB that is not there: see tests/simulated_gpu.py.

ComfyUI moves models, latents and text to it and back, and so does the pack.  What was left on the
other side raises as it does on CUDA.  Formats that need a kernel of some GPU are not to be had on it.

``dynamic`` is how ComfyUI loads on NVIDIA GPUs unless told otherwise: weights stay where they are, and
each layer copies its own to the GPU when it runs, and again when they had to make room.  ComfyUI has
comfy-aimdo keep the copies; here it is ``Copies``.

``gpu_host`` is the same on a real GPU, where the tests run on one.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from simulated_gpu import GPU, OnGPU, simulated_gpu

from benchmarks import _host

TOTAL, FREE, PINNED = 24e9, 20e9, 8e9
BUFFER = 2**29  # bytes: more than any model here; memory is taken as it is used
NAME = "NVIDIA GPU, simulated"


def _facts() -> dict[str, object]:
    """What ComfyUI asks torch.cuda about a GPU."""
    properties = SimpleNamespace(name=NAME, major=8, minor=6, total_memory=int(TOTAL))
    return {
        "current_device": lambda: GPU.index,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda *_: Stream(),
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0
        ),
    }


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_uint8.from_buffer(memory))


def _bytes(owner: Copies | Buffer, start: int, size: int) -> torch.Tensor:
    return torch.frombuffer(owner.memory, dtype=torch.uint8, count=size, offset=start)


class Copies:
    """The copies of one model's weights on the GPU; ``room`` bytes of them fit on it (None: all)."""

    room: int | None = None

    def __init__(self, size: int, device: int):
        self.memory = mmap.mmap(-1, int(size))  # taken as it is used
        self.sizes: dict[int, int] = {}
        self.made: dict[int, int] = {}  # which copy of a weight is there; evicted ones are not
        self.end = self.count = 0

    def __deepcopy__(self, memo):
        raise TypeError("a handle of the driver was copied: it would be freed twice")

    def alloc(self, size: int):
        start, self.end = self.end, self.end + size
        self.sizes[start] = size
        return self, start, size

    def fault(self, start: int, size: int) -> bytes | None:
        """The copies' signature, of others after each eviction; None if there is no room."""
        asked = [place for place in self.sizes if start <= place < start + size]
        new = [place for place in asked if place not in self.made]
        wanted = sum(self.sizes[place] for place in new)
        if self.room is not None and new and self.loaded_size() + wanted > self.room:
            return None
        for place in new:
            self.count += 1
            self.made[place] = self.count
            _bytes(self, place, self.sizes[place]).random_()
        return b"".join(self.made[place].to_bytes(8, "little") for place in asked)

    def unpin(self, start: int, size: int) -> None: ...

    def prioritize(self) -> None: ...

    def loaded_size(self) -> int:
        return sum(self.sizes[place] for place in self.made)

    def free_memory(self, wanted: float) -> int:
        freed = 0
        while self.made and freed < wanted:
            freed += self.sizes[self.made.popitem()[0]]
        return freed


def _on_gpu(alloc, device) -> torch.Tensor:
    owner, start, size = alloc
    return OnGPU(_bytes(owner, start, size))


class Buffer:
    """Memory that grows in place: on the GPU for what is on its way, on the CPU as what CUDA pins."""

    def __init__(self, *_, **__):
        # No tensor: ComfyUI makes the tensor's storage hold this buffer, so neither would be freed.
        self.size_, self.memory = 0, mmap.mmap(-1, BUFFER)

    __deepcopy__ = Copies.__deepcopy__


class OnTheWay(Buffer):
    """A stream's buffer on the GPU."""

    def size(self) -> int:
        return self.size_

    def get(self, size: int, offset: int = 0):
        self.size_ = max(self.size_, offset + size)
        return self, offset, size


class Pinned(Buffer):
    """Copies of weights in memory from which CUDA reads while the GPU computes."""

    @property
    def size(self) -> int:
        return self.size_

    def get_raw_address(self) -> int:
        return _address(self.memory)

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        self.size_ += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size_ = size

    def read_file_slice(self, file, place, size, offset=0, stream=0, device_ptr=0, device=-1):
        address = self.get_raw_address() + offset
        ctypes.memmove(address, os.pread(file, size, place), size)
        if device_ptr:
            ctypes.memmove(device_ptr, address, size)


class Stream:
    """The GPU's work in order: here it is done at once."""

    def __init__(self, *_, **__): ...

    def wait_stream(self, other) -> None: ...

    def synchronize(self) -> None: ...


class _Mapped:
    def __init__(self, path: str):
        self._file = open(path, "rb")  # noqa: SIM115
        self._map = mmap.mmap(self._file.fileno(), 0, mmap.MAP_PRIVATE)

    def get(self) -> int:
        return _address(self._map)

    def get_file_handle(self) -> int:
        return self._file.fileno()

    def bounce(self) -> bool:
        return True


def _read_to_gpu(file, offset, size, stream, address, device, mark_cold=True) -> None:
    ctypes.memmove(address, os.pread(file, size, offset), size)


def _copies_of_weights(stack: ExitStack, room: int | None) -> None:
    names = ("model_vbar", "torch", "host_buffer", "model_mmap", "vram_buffer")
    bars, tensors, buffers, maps, rooms = (
        importlib.import_module(f"comfy_aimdo.{n}") for n in names
    )
    stack.enter_context(_host.loading_dynamically())
    stack.enter_context(patch.object(Copies, "room", room))
    for owner, name, value in (
        (bars, "ModelVBAR", Copies),
        (tensors, "aimdo_to_tensor", _on_gpu),
        (tensors, "hostbuf_to_tensor", lambda buffer: _bytes(buffer, 0, buffer.size)),
        (rooms, "VRAMBuffer", OnTheWay),
        (buffers, "HostBuffer", Pinned),
        (buffers, "read_file_to_device", _read_to_gpu),
        (maps, "ModelMMAP", _Mapped),
    ):
        stack.enter_context(patch.object(owner, name, value))


@contextmanager
def simulated_host(dynamic: bool = False, room: int | None = None) -> Iterator[torch.device]:
    """Inside, ComfyUI computes on ``cuda:0`` and keeps on the CPU what it has no use for."""
    management = importlib.import_module("comfy.model_management")
    if management.get_torch_device() == GPU:
        raise RuntimeError("a GPU is simulated already")

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
        "NUM_STREAMS": 2,
        "STREAMS": {},
        "stream_counters": {},
        "STREAM_CAST_BUFFERS": {},
        "STREAM_AIMDO_CAST_BUFFERS": {},
        "MAX_PINNED_MEMORY": PINNED,
        "TOTAL_PINNED_MEMORY": 0,
        "PINNED_MEMORY": {},
    }
    with ExitStack() as stack, simulated_gpu() as device:
        for name, value in ours.items():
            stack.enter_context(patch.object(management, name, value))
        for name, value in _facts().items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        if dynamic:
            _copies_of_weights(stack, room)
        yield device


@contextmanager
def gpu_host(dynamic: bool = False, room: int | None = None) -> Iterator[None]:
    """``simulated_host``, unless the tests run on a real GPU; there ``room`` is what there is."""
    if os.environ.get("QSCHED_TEST_DEVICE") != "cuda":
        with simulated_host(dynamic, room):
            yield
        return
    if dynamic and not _host.can_load_dynamically():
        pytest.skip("comfy-aimdo, with which ComfyUI loads dynamically, does not run here")
    with _host.loading_dynamically(dynamic):
        yield
        importlib.import_module("comfy.model_management").unload_all_models()
