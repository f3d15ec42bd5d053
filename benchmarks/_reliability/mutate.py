"""Damaged copies of a file or a text, each from its own seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

TOKENS = (
    b"0", b"-", b"-0", b"1e3", b"1e999", b"NaN", b"Infinity", b"null", b"true", b'"', b"'", b"\\",
    b"[", b"]", b"{", b"}", b",", b":", b"=", b"|", b";", b"*", b"?", b"+", b"@", b"#", b"/", b"..",
    b"\x00", b"\n", b"\r", b"\t", b" ", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xae",
    b"\\ud800", b"9" * 400, b"[" * 300, b'{"a":' * 200, b"fp16", b"nf4", b"clip", b"[heldout]",
)  # fmt: skip


class _Raw:
    """A piece of JSON that no Python value gives."""

    def __init__(self, text: str):
        self.text = text


JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 0.5, 1e-320, 1e308, -1e308, "", "x", "0",
    " ", "\u202e", "\x00", "\ud800", "euler", "nf4", "F32", "../x", "a" * 5000, [], {}, [[]], [0], [1, 2, 3],
    [-1, 1], {"a": 1}, {"": None}, [None], [1.5], [True], _Raw("NaN"), _Raw("-Infinity"), _Raw("1e999"),
    _Raw("-0"), _Raw("9" * 500), _Raw("[" * 500 + "]" * 500), _Raw('{"a":' * 200 + "1" + "}" * 200),
    _Raw('{"a":1,"a":2}'),
)  # fmt: skip


def of_bytes(data: bytes, chance: random.Random) -> bytes:
    """``data`` with one to four edits: bytes changed, cut out, put in, doubled, moved or cut off."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(EDITS)(data, chance)
    return data


def of_json(data: bytes, chance: random.Random) -> bytes:
    """JSON with values replaced, left out, doubled or moved; at times a plain edit of its bytes."""
    if chance.random() < 0.3:
        return of_bytes(data, chance)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # it was damaged before
        return of_bytes(data, chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        content = _changed(content, chance)
    return _dumped(content).encode("utf-8", "surrogatepass")


def of_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header is damaged, or that was cut; its length mostly fits."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = chance.random()
    if kind < 0.05:
        return data[: chance.randrange(len(data))]
    if kind < 0.1:
        return of_bytes(data[:8], chance) + header + rest
    header = (of_json if kind < 0.7 else of_bytes)(header, chance)
    if kind > 0.95:
        rest = rest[: chance.randrange(len(rest) + 1)] + bytes(chance.randrange(3))
    size = length if chance.random() < 0.05 else len(header)
    return struct.pack("<Q", size) + header + rest


def of_model(data: bytes, chance: random.Random) -> bytes:
    """A sound safetensors file that says something else: other names, shapes, dtypes, entries, metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        key: [e["dtype"], e["shape"], body[slice(*e["data_offsets"])]] for key, e in header.items()
    }
    for _ in range(chance.choice((1, 1, 2, 3))):
        how, key = chance.random(), chance.choice(list(tensors))
        entries = [name for name in tensors if name.endswith(".comfy_quant")]
        if how < 0.35 and entries:
            key = chance.choice(entries)
            changed = of_json(tensors[key][2], chance)
            tensors[key] = ["U8", [len(changed)], changed]
        elif how < 0.5 and metadata:
            key = chance.choice(list(metadata))
            text = metadata[key].encode()
            edit = of_json if text[:1] == b"{" else of_bytes
            metadata[key] = edit(text, chance).decode("utf-8", "replace")
        elif how < 0.6:
            tensors.pop(key)
        elif how < 0.7:
            tensors[of_bytes(key.encode(), chance).decode("utf-8", "replace")] = tensors.pop(key)
        elif how < 0.8:
            tensors[key][2] = tensors[chance.choice(list(tensors))][2]
            tensors[key][:2] = "U8", [len(tensors[key][2])]
        elif how < 0.9:
            tensors[key][1] = _reshaped(tensors[key][1], chance)
        else:
            same = {"F16": ("BF16", "I16"), "BF16": ("F16", "U16"), "F32": ("I32", "U32"),
                    "U8": ("I8", "BOOL", "F8_E4M3"), "I8": ("U8",), "F8_E4M3": ("U8", "F8_E5M2")}  # fmt: skip
            tensors[key][0] = chance.choice(same.get(tensors[key][0], (tensors[key][0],)))
    parts, place, made = [], 0, {"__metadata__": metadata}
    for key, (dtype, shape, raw) in tensors.items():
        made[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(raw)]}
        parts.append(raw)
        place += len(raw)
    text = json.dumps(made, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _reshaped(shape: list[int], chance: random.Random) -> list[int]:
    """The same number of values in another shape."""
    count = 1
    for size in shape:
        count *= size
    options = [[count], [1, count], [count, 1], shape[::-1], [*shape, 1], [1, *shape]]
    if count % 2 == 0:
        options += [[2, count // 2], [count // 2, 2]]
    return chance.choice(options)


def any_byte(data: bytes, chance: random.Random) -> bytes:
    """One byte other than it was: digits for digits, else anything."""
    at = chance.randrange(len(data))
    kind = b"0123456789" if data[at : at + 1].isdigit() else bytes(range(256))
    return data[:at] + bytes([chance.choice([b for b in kind if b != data[at]])]) + data[at + 1 :]


def _put(data: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + chance.choice(TOKENS) + data[at:]


def _flip(data: bytes, chance: random.Random) -> bytes:
    return any_byte(data, chance) if data else data


def _cut(data: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + data[at + chance.choice((1, 1, 2, 5, 30)) :]


def _double(data: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    stop = start + chance.choice((1, 3, 10, 100))
    return data[:stop] + data[start:stop] * chance.choice((1, 1, 3, 40)) + data[stop:]


def _swap(data: bytes, chance: random.Random) -> bytes:
    a, b, c = sorted(chance.randint(0, len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _end(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))]


EDITS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _flip, _put, _put, _cut, _double, _swap, _end,
)  # fmt: skip


def _changed(content: Any, chance: random.Random) -> Any:
    """``content`` with one place of it changed."""
    paths = list(_paths(content))
    path = chance.choice(paths)
    if not path:
        return _junk(chance)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    key, how = path[-1], chance.random()
    if how < 0.6:
        owner[key] = _junk(chance)
    elif how < 0.75:
        del owner[key]
    elif how < 0.9:
        other = content
        for step in chance.choice(paths):
            other = other[step]
        owner[key] = json.loads(json.dumps(other, default=lambda raw: None))
    elif isinstance(owner, dict):
        owner[str(_junk(chance))[:50]] = owner[key]
    else:
        owner.extend(owner[key:] * chance.choice((1, 1, 30)))
    return content


def _junk(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(JUNK))


def _paths(content: Any, at: tuple = ()):
    yield at
    if isinstance(content, dict):
        for key in content:
            yield from _paths(content[key], (*at, key))
    elif isinstance(content, list):
        for i in range(min(len(content), 20)):
            yield from _paths(content[i], (*at, i))


def _dumped(content: Any) -> str:
    marks: dict[str, str] = {}

    def raw(value: _Raw) -> str:
        mark = f"@raw{len(marks)}@"
        marks[f'"{mark}"'] = value.text
        return mark

    text = json.dumps(content, default=raw, ensure_ascii=False)
    for mark, put in marks.items():
        text = text.replace(mark, put)
    return text
