"""What a saved file says of a quantized layer: the JSON of its "comfy_quant" tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from ..text import shown
from .base import FormatError, Packed, WeightFormat

SUFFIX = ".comfy_quant"
MAX_ENTRY = 1 << 20  # bytes; a real one has some hundred
LARGEST = 1e300  # an integer may have more digits than any float
VALUES_A_BYTE = 8  # more than any format packs into a byte of codes


def is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (2, 4)
        and all(type(size) is int and 0 < size < 2**40 for size in value)
    )


def is_options(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (int, float, str)) for v in value.values())


def is_error(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


# What we read, and what must stand there; the host's other values are its own business.
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: isinstance(value, str), "a text"),
    "shape": (is_shape, "2 or 4 whole numbers from 1"),
    "sample": (
        lambda value: isinstance(value, str) and re.fullmatch(r"(?:[0-9a-fA-F]{2})*", value),
        "bytes in hexadecimal",
    ),
    "error": (is_error, "a number from 0"),
    "calibrated": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_error, value)),
        "two numbers from 0",
    ),
    "options": (is_options, "an object of plain values"),
    "params": (lambda value: isinstance(value, dict), "an object"),
    "full_precision_matrix_mult": (lambda value: isinstance(value, bool), "true or false"),
    "convrot": (lambda value: isinstance(value, bool), "true or false"),
}


def read_entry(tensor: torch.Tensor, key: str, file: str) -> dict[str, Any]:
    """The entry that ``tensor``, called ``key`` in ``file``, holds; null values are left out.

    FormatError names the file and the layer whose entry is no JSON, or has a value of another type.
    """
    layer = f"{file}: layer {shown(key.removesuffix(SUFFIX))}"
    if tensor.dtype not in (torch.uint8, torch.int8) or not 0 < tensor.numel() <= MAX_ENTRY:
        raise FormatError(
            f"{layer}: its comfy_quant is {list(tensor.shape)} of {tensor.dtype}, no text in "
            "bytes; get the file again"
        )
    try:
        found = json.loads(tensor.cpu().numpy().tobytes())
    except (ValueError, RecursionError):
        raise FormatError(f"{layer}: its comfy_quant is no JSON; get the file again") from None
    if not isinstance(found, dict):
        raise FormatError(f"{layer}: its comfy_quant is no JSON object; get the file again")
    entry = {name: value for name, value in found.items() if value is not None}
    for name, (fits, wanted) in FIELDS.items():
        if name in entry and not fits(entry[name]):
            raise FormatError(
                f"{layer}: {name!r} of its comfy_quant is {repr(entry[name])[:60]}, not "
                f"{wanted}; get the file again"
            )
    return entry


def check_stored(packed: Packed, key: str, file: str, by_rows: bool) -> None:
    """FormatError, naming file and layer, if the codes can't be those of a weight of that shape.

    ``by_rows``: the codes have a row for each of the weight's.
    """
    size = packed.codes.numel() * packed.codes.element_size()
    rows = packed.codes.shape[0] if packed.codes.ndim else 0
    if math.prod(packed.shape) > VALUES_A_BYTE * size or (by_rows and rows != packed.shape[0]):
        raise FormatError(
            f"{file}: layer {shown(key.removesuffix(SUFFIX))}: its codes {list(packed.codes.shape)} of "
            f"{packed.codes.dtype} are no weight of the shape {list(packed.shape)}; get the file again"
        )


def check_tables(packed: Packed, form: WeightFormat, key: str, file: str) -> None:
    """FormatError unless codes, tables and options are such as ``form``'s own packing has.

    Kernels take the tables' lengths for granted: a short one is read beyond its end.  Other programs
    write native formats too: there a table may also be one number for all rows, in any float dtype.
    """
    check_stored(packed, key, file, form.native is None)
    wrong = form.wrong_options(packed.options) if form.native is None else None
    if wrong is not None:
        raise FormatError(
            f"{file}: layer {shown(key.removesuffix(SUFFIX))}: {wrong}; get the file again"
        )
    given = {"codes": packed.codes, **packed.aux}
    for table, (rows, rest, dtype) in _tables(form, packed.shape[1:]).items():
        wanted = (*((packed.shape[0],) if rows else ()), *rest)
        found = given[table]
        fits = tuple(found.shape) == wanted and found.dtype == dtype
        if form.native is not None and table != "codes":
            one = found.numel() == 1 and found.ndim <= 2
            fits = found.is_floating_point() and (one or tuple(found.shape) in (wanted, wanted[:1]))
        if not fits:
            raise FormatError(
                f"{file}: layer {shown(key.removesuffix(SUFFIX))}: its {table} is "
                f"{list(found.shape)} of {found.dtype}, and {form.name} has {list(wanted)} of {dtype} for "
                f"a weight of the shape {list(packed.shape)}; get the file again"
            )


@lru_cache(maxsize=256)
def _tables(form: WeightFormat, columns: tuple[int, ...]) -> Mapping[str, tuple]:
    """Of codes and tables: whether they have the weight's rows, the shape of one, and the dtype.

    Found by packing two rows, and three.  Tables that do not grow by rows are left out, and all
    where the format can't pack here.
    """
    if form.available("cpu") is not None or any(
        form.unfit((rows, *columns)) is not None for rows in (2, 3)
    ):
        return {}
    two, three = (form.quantize(torch.zeros(rows, *columns)) for rows in (2, 3))
    tables = {"codes": (two.codes, three.codes)} | {
        n: (t, three.aux[n]) for n, t in two.aux.items()
    }
    return {
        name: (bool(t.ndim), tuple(t.shape[1:]), t.dtype)
        for name, (t, more) in tables.items()
        if not t.ndim or (t.shape[0], more.shape) == (2, (3, *t.shape[1:]))
    }
