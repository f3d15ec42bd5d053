"""The header of a safetensors file: read, and checked as strictly as the library does.

The library's own reader gives no places in the file and names no tensor in most of its errors, and a
key that is there twice passes it.  So the header is read here, and tests hold it against the library.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..text import shown
from .base import FormatError

MAX_HEADER = 100_000_000  # bytes; what the safetensors library itself accepts
MAX_DIMENSIONS = 64  # what torch's own operations can handle
MAX_NUMBER = 2**63 - 1
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as safetensors writes it, shape, and its place among the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors, its metadata, and where the tensors' data begin (bytes)."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data: int


class _Twice:
    """Stands for a JSON object in which ``key`` is there twice."""

    def __init__(self, key: str):
        self.key = key


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    FormatError names a file that is empty, cut short or no safetensors file, and the tensor whose
    entry is wrong; OSError if it can't be read.
    """
    with open(path, "rb") as file:
        header = header_of(file, Path(path).name)
    return header.tensors, header.metadata


def header_of(file: BinaryIO, name: str) -> Header:
    """The header of an open file, called ``name`` in errors; errors as :func:`read_header`."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if start[:4] == b"GGUF":
        raise FormatError(
            f"{name} is a GGUF file, which is quantized already; "
            "load it with a GGUF loader node, or give the fp16 or bf16 file"
        )
    if len(start) < 8:
        raise FormatError(f"{name} is empty or cut short ({size} bytes); download it again")
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= MAX_HEADER:
        raise FormatError(f"{name} is not a safetensors file (its header says {length} bytes)")
    if size < 8 + length:
        raise _cut_short(name, size, 8 + length)
    content = _parse(file.read(length), name)
    metadata = _metadata(content.pop("__metadata__", None), name)
    tensors: dict[str, Entry] = {}
    places: list[tuple[int, int, str]] = []
    for key, info in content.items():
        try:
            tensors[key], end = _entry(info)
        except ValueError as error:
            raise _damaged(name, f"tensor {shown(key)}: {error}") from None
        places.append((tensors[key].start, end, key))
    data = 8 + length
    end = _check_places(places, name)
    if size < data + end:
        raise _cut_short(name, size, data + end)
    if size > data + end:
        raise _damaged(name, f"{size - data - end} bytes after the last tensor belong to none")
    return Header(tensors, metadata, data)


def _parse(raw: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_int, parse_constant=_constant
        )
    except RecursionError:
        raise _damaged(name, "it is nested too deeply") from None
    except ValueError as error:
        raise _damaged(name, str(error)) from None
    if isinstance(content, _Twice):
        raise _damaged(name, f"tensor {shown(content.key)} is there twice")
    if not isinstance(content, dict):
        raise _damaged(name, "it is no JSON object")
    for key in content:
        if not _is_text(key):
            raise _damaged(name, f"tensor {shown(key)}: its name is no text")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys: set[str] = set()
    return _Twice(next(key for key, _ in pairs if key in keys or keys.add(key)))


def _int(text: str) -> int | float:
    # As the library: -0 is no integer, nor is what no 64 bits hold (whose parsing would be slow).
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _is_text(value: object) -> bool:
    """Whether ``value`` is a string that UTF-8 can write: no half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _metadata(found: Any, name: str) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, _Twice):
        raise _damaged(name, f"__metadata__ has {shown(found.key)} twice")
    if not isinstance(found, dict):
        raise _damaged(name, "__metadata__ is no JSON object")
    for key, value in found.items():
        if not (_is_text(key) and _is_text(value)):
            raise _damaged(name, f"__metadata__: the value of {shown(key)} is no text")
    return found


def _entry(info: Any) -> tuple[Entry, int]:
    """The entry that ``info`` describes and where its data end; ValueError says what is wrong."""
    if isinstance(info, _Twice):
        raise ValueError(f"{shown(info.key)} is there twice")
    if not isinstance(info, Mapping):
        raise ValueError("it is described by no JSON object")
    for field in FIELDS:
        if field not in info:
            raise ValueError(f"it has no {field!r}")
    for field, value in info.items():
        if field not in FIELDS and isinstance(value, (Mapping, list, _Twice)):
            raise ValueError(f"{shown(field)} is unknown")
    dtype, shape, offsets = (info[field] for field in FIELDS)
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"its dtype is {shown(dtype)}, unknown to safetensors")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError("its shape is no list of whole numbers from 0")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"its shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} can be")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError("its data_offsets are no two whole numbers from 0")
    if math.prod(max(1, size) for size in shape) > MAX_NUMBER:
        raise ValueError(f"its shape {shown(shape)} is too large")
    bits, (start, end) = math.prod(shape) * ITEM_BITS[dtype], offsets
    if bits % 8 or end - start != bits // 8:
        raise ValueError(
            f"its shape {shown(shape)} of {dtype} takes {bits / 8:g} bytes, its data_offsets {offsets} give "
            f"{end - start}"
        )
    return Entry(dtype, tuple(shape), start), end


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _check_places(places: list[tuple[int, int, str]], name: str) -> int:
    """Where the data of all tensors end; FormatError where they overlap or leave a gap."""
    reached = 0
    for start, end, key in sorted(places):
        if start != reached:
            how = "overlaps the one before it" if start < reached else "leaves a gap before it"
            raise _damaged(name, f"tensor {shown(key)} {how} (it starts at {start}, not {reached})")
        reached = end
    return reached


def _damaged(name: str, reason: str) -> FormatError:
    return FormatError(
        f"{name} has a damaged safetensors header ({reason}); download or copy it again"
    )


def _cut_short(name: str, size: int, wanted: int) -> FormatError:
    return FormatError(
        f"{name} is cut short: it has {size} bytes, its header promises {wanted}; "
        "download or copy it again"
    )
