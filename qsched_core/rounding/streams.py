"""What finished blocks gave, in a file: host memory does not grow with the number of states.

The file is read through a mapping and written by ordinary writes, since a full disk is an error for
these and would end the process for a mapping.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import check_folder, disk_error
from ..workspace import Workspace, remove_abandoned
from .blocks import map_tensors

ALIGNED = 64  # bytes: where a tensor may begin
NAME = "states"


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file: at ``offset`` (None: it was let go), ``size`` bytes with what fills up.

    No tensor without memory, small as that is: thousands of these would lie between the large
    pieces that the heap frees, and keep it from giving them out again.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None
    size: int = 0

    @classmethod
    def hollow(cls, tensor: torch.Tensor) -> _Stored:
        return cls(tensor.dtype, tuple(tensor.shape))


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
        self._trees: dict[Hashable, Any] = {}
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
        self._trees.clear()
        self._file.close()
        self._work.__exit__(*exception)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._trees

    @property
    def nbytes(self) -> int:
        """How long the file is."""
        return self._room.end

    def put(self, key: Hashable, tree: Any) -> None:
        """Store ``tree`` as it is now, in place of what was called ``key``."""
        self.drop(key)
        try:
            self._trees[key] = map_tensors(tree, self._write)
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self.folder / NAME, self.needed) from error

    def _write(self, tensor: torch.Tensor) -> _Stored:
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        size = -(-len(raw) // ALIGNED) * ALIGNED
        offset = self._room.take(size) if size else 0
        self._file.seek(offset)
        self._file.write(raw.numpy().data)
        return _Stored(tensor.dtype, tuple(tensor.shape), offset, size)

    def hollow(self, key: Hashable, tree: Any = None) -> None:
        """Keep shapes and dtypes alone: of what is called ``key``, or of ``tree``."""
        if tree is None:
            stored = self._trees[key]
            tree = map_tensors(stored, lambda s: _Stored(s.dtype, s.shape), _Stored)
        else:
            tree = map_tensors(tree, _Stored.hollow)
        self.drop(key)
        self._trees[key] = tree

    def drop(self, key: Hashable) -> None:
        """Let go of what is called ``key``, if there is such."""
        if key not in self._trees:
            return
        places: list[_Stored] = []
        map_tensors(self._trees.pop(key), places.append, _Stored)
        freed = [place for place in places if place.size]
        for place in freed:
            self._room.give(place.offset, place.size)
        if freed:
            self._file.truncate(self._room.end)

    def clear(self) -> None:
        """Let go of all."""
        for key in list(self._trees):
            self.drop(key)

    def get(self, key: Hashable, device: torch.device | str) -> Any:
        """A copy of the tree called ``key`` on ``device``; zeros where it was hollowed."""
        return map_tensors(self._trees[key], lambda stored: self._read(stored, device), _Stored)

    def _read(self, stored: _Stored, device: torch.device | str) -> torch.Tensor:
        count = math.prod(stored.shape) * stored.dtype.itemsize
        if stored.offset is None or not count:
            return torch.zeros(stored.shape, dtype=stored.dtype, device=device)
        # Copy on write: torch wants arrays that can be written to.  It ends with this call.
        raw = np.memmap(self._work.data, np.uint8, "c", stored.offset, (count,))
        data = torch.from_numpy(raw).view(stored.dtype).view(stored.shape)
        return data.to(device, copy=True)
