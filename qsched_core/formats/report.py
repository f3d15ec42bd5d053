"""Where a quantized model's precision goes: rows by layer, as text and as a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..text import markdown


@dataclass(frozen=True)
class LayerRow:
    """One layer's weight: its format, bytes as stored, and relative error (None: unknown).

    ``why`` says why a layer that could have been quantized was kept.  Of a layer whose weight was
    rounded for its inputs, ``calibrated`` has the relative errors of its output: rounded plainly, and
    as it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    error: float | None = None
    why: str = ""
    calibrated: tuple[float, float] | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight as stored, tables and padding counted."""
        return 8 * self.nbytes / max(self.weights, 1)


def summary(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """One row a format: its layers' weights and bytes, and their error (weighted by size)."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.format].append(row)
    found = []
    for form, group in groups.items():
        known = [r for r in group if r.error is not None]
        weights = sum(r.weights for r in known)
        error = None
        if weights:
            error = math.sqrt(sum(r.error**2 * r.weights for r in known) / weights)
        label = f"{len(group)} layer{'s' if len(group) > 1 else ''}"
        shape = (sum(r.weights for r in group),)
        found.append(LayerRow(label, "", shape, form, sum(r.nbytes for r in group), error))
    return sorted(found, key=lambda r: -r.nbytes)


def table(rows: Sequence[LayerRow]) -> str:
    """Text: a line a format, the whole, then a line a layer in the model's order; names are escaped."""
    if not rows:
        return "no layer with a weight of two or more dimensions"
    whole = LayerRow(
        f"{len(rows)} layers",
        "",
        (sum(r.weights for r in rows),),
        "all",
        sum(r.nbytes for r in rows),
    )
    rows = [replace(r, name=markdown(r.name), format=markdown(r.format)) for r in rows]
    width = max(len(r.name) for r in rows)
    forms = max(7, *(len(r.format) for r in rows))
    lines = [_line("", "format", "weights", "MB", "bits", "error", "", forms, width)]
    lines += [_row(r, forms, width) for r in (*summary(rows), whole)]
    lines += ["", _line("layer", "format", "shape", "MB", "bits", "error", "", forms, width)]
    lines += [_row(r, forms, width) for r in rows]
    return "\n".join(lines)


def _row(row: LayerRow, forms: int, width: int) -> str:
    shape = "x".join(map(str, row.shape)) if len(row.shape) > 1 else f"{row.weights / 1e6:.2f} M"
    error = "" if row.error is None else f"{row.error:.4f}"
    note = row.why
    if row.calibrated is not None:
        note = "calibrated: output error {:.4f} -> {:.4f}".format(*row.calibrated)
    return _line(
        row.name, row.format, shape, f"{row.nbytes / 1e6:.3f}", f"{row.bits:.3f}", error, note,
        forms, width,
    )  # fmt: skip


def _line(name, form, shape, size, bits, error, why, forms, width) -> str:
    text = f"{name:{width}}  {form:{forms}}  {shape:>16}  {size:>10}  {bits:>7}  {error:>7}  {why}"
    return text.rstrip()
