"""What finished blocks gave, in a file: host memory does not grow with the number of states.

The file is read through a mapping and written by ordinary writes, since a full disk is an error for
these and would end the process for a mapping.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import check_folder, disk_error
from ..workspace import Workspace, remove_abandoned
from .blocks import map_tensors, tensors_of

ALIGNED = 64  # bytes: where a tensor may begin
NAME = "states"


@dataclass(frozen=True)
class _Stored:
    """A tree whose tensors have no memory, and the place in the file of each (None: let go)."""

    tree: Any
    places: tuple[tuple[int, int], ...] | None


class _Room:
    """Free places of a file, as (offset, bytes), and where it ends."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int]] = []
        self.end = 0

    def take(self, size: int) -> int:
        for index, (offset, there) in enumerate(self.free):
            if there >= size:
                self.free[index : index + 1] = (
                    [(offset + size, there - size)] if there > size else []
                )
                return offset
        self.end += size
        return self.end - size

    def give(self, offset: int, size: int) -> None:
        index = bisect.bisect(self.free, (offset, size))
        self.free.insert(index, (offset, size))
        for left in (index, index - 1):  # neighbours become one
            if left >= 0 and left + 1 < len(self.free):
                (a, first), (b, second) = self.free[left : left + 2]
                if a + first == b:
                    self.free[left : left + 2] = [(a, first + second)]
        if self.free and sum(self.free[-1]) == self.end:
            self.end = self.free.pop()[0]


class Streams:
    """Trees of tensors by key, in a scratch file in ``folder``, as a context manager.

    Places that are let go are used again, and the file ends where the last kept tensor does.  It goes
    when the context is left; what a killed process left in ``folder`` goes when it is entered.
    DiskError, before anything is stored, unless the disk has ``needed`` bytes free; and where it
    fills up on the way.
    """

    def __init__(self, folder: Path, needed: int):
        self.folder, self.needed = folder, needed
        self._stored: dict[Hashable, _Stored] = {}
        self._room = _Room()

    def __enter__(self) -> Streams:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder)
        check_folder(self.folder, self.needed, self.folder / NAME)
        self._work = Workspace(self.folder, NAME).__enter__()
        try:
            self._file = open(self._work.data, "w+b")
        except BaseException:
            self._work.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._stored.clear()
        self._file.close()
        self._work.__exit__(*exception)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._stored

    @property
    def nbytes(self) -> int:
        """How long the file is."""
        return self._room.end

    def put(self, key: Hashable, tree: Any) -> None:
        """Store ``tree`` as it is now, in place of what was called ``key``."""
        self.drop(key)
        places: list[tuple[int, int]] = []
        try:
            for tensor in tensors_of(tree):
                places.append(self._write(tensor))
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self.folder / NAME, self.needed) from error
        self._stored[key] = _Stored(_without_memory(tree), tuple(places))

    def _write(self, tensor: torch.Tensor) -> tuple[int, int]:
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        if not len(raw):
            return 0, 0
        size = -(-len(raw) // ALIGNED) * ALIGNED
        offset = self._room.take(size)
        self._file.seek(offset)
        self._file.write(raw.numpy().data)
        return offset, size

    def hollow(self, key: Hashable, tree: Any = None) -> None:
        """Keep shapes and dtypes alone: of what is called ``key``, or of ``tree``."""
        tree = self._stored[key].tree if tree is None else _without_memory(tree)
        self.drop(key)
        self._stored[key] = _Stored(tree, None)

    def drop(self, key: Hashable) -> None:
        """Let go of what is called ``key``, if there is such."""
        stored = self._stored.pop(key, None)
        if stored is None or not stored.places:
            return
        for offset, size in stored.places:
            if size:
                self._room.give(offset, size)
        self._file.truncate(self._room.end)

    def clear(self) -> None:
        """Let go of all."""
        for key in list(self._stored):
            self.drop(key)

    def get(self, key: Hashable, device: torch.device | str) -> Any:
        """A copy of the tree called ``key`` on ``device``; zeros where it was hollowed."""
        stored = self._stored[key]
        if stored.places is None:
            return map_tensors(
                stored.tree, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device)
            )
        places = iter(stored.places)
        return map_tensors(stored.tree, lambda t: self._read(next(places)[0], t, device))

    def _read(self, offset: int, like: torch.Tensor, device) -> torch.Tensor:
        size = like.numel() * like.element_size()
        if not size:
            return torch.empty(like.shape, dtype=like.dtype, device=device)
        # Copy on write: torch wants arrays that can be written to.  It ends with this call.
        raw = torch.from_numpy(np.memmap(self._work.data, np.uint8, "c", offset, (size,)))
        return raw.view(like.dtype).view(like.shape).to(device, copy=True)


def _without_memory(tree: Any) -> Any:
    return map_tensors(tree, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
