"""Second moments of a layer's inputs: all that rounding needs to know of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from .errors import RoundingError

FINE_WIDTH = 2048  # up to so many columns sums are fp64: they take little memory there
CAST_ELEMENTS = 1 << 25  # inputs that are made fp32 at a time


@dataclass
class Moments:
    """Means over a layer's input rows, on the device of the model.

    ``h`` [in, in] is E[x_q x_q^T] of the inputs that the quantized model gives the layer, ``cross``
    [in, in] E[x_fp x_q^T] with those of the unquantized one (None: as ``h``); ``mean_q`` and
    ``mean_fp`` [in], fp64, their means, ``rows`` how many rows there were.
    """

    h: torch.Tensor
    cross: torch.Tensor | None
    mean_q: torch.Tensor
    mean_fp: torch.Tensor
    rows: int

    def copied(self) -> Moments:
        cross = None if self.cross is None else self.cross.clone()
        return Moments(self.h.clone(), cross, self.mean_q, self.mean_fp, self.rows)

    def centre(self) -> None:
        """Make them, in place, moments around the means: what a weight is for beside a bias."""
        q, fp = self.mean_q.to(self.h.dtype), self.mean_fp.to(self.h.dtype)
        self.h.addr_(q, q, alpha=-1)
        if self.cross is not None:
            self.cross.addr_(fp, q, alpha=-1)

    def centred(self) -> Moments:
        """A copy around the means."""
        made = self.copied()
        made.centre()
        return made

    @property
    def is_finite(self) -> bool:
        sums = [m.sum() for m in (self.h, self.cross) if m is not None]
        return all(bool(torch.isfinite(total)) for total in sums)


class Gathering:
    """Adds up moments batch by batch: products in fp32, their sums in fp64 where that is small.

    Sums in 16 bits would leave matrices that are not positive definite.  ``cuts`` are the columns
    before which the matrices are cut: only the blocks on the diagonal are gathered.
    """

    def __init__(self, cuts: Sequence[int] = ()) -> None:
        self._cuts = tuple(cuts)
        self._sums: list[list[torch.Tensor]] = []  # of each block
        self.rows = 0

    def add(self, x_q: torch.Tensor, x_fp: torch.Tensor | None) -> None:
        """Inputs [..., in] of the quantized and of the unquantized model, row by row the same place.

        ``x_fp`` None, each time: as ``x_q``.
        """
        if x_fp is not None and x_q.shape != x_fp.shape:
            raise RoundingError(
                f"the quantized model gives it inputs {list(x_q.shape)}, the unquantized one "
                f"{list(x_fp.shape)}; a model whose shapes depend on its values can't be calibrated"
            )
        streams = [x.reshape(-1, x.shape[-1]) for x in (x_q, x_fp) if x is not None]
        step = max(1, CAST_ELEMENTS // x_q.shape[-1])
        for rows in zip(*(x.split(step) for x in streams), strict=True):
            self._add([x.float() for x in rows])
        self.rows += len(streams[0])

    def _add(self, streams: Sequence[torch.Tensor]) -> None:
        ends = [0, *self._cuts, streams[0].shape[1]]
        for k, (start, stop) in enumerate(pairwise(ends)):
            width, columns = stop - start, [x[:, start:stop] for x in streams]
            if k == len(self._sums):
                fine = torch.float64 if width <= FINE_WIDTH else torch.float32
                made = [columns[0].new_zeros(width, width, dtype=fine) for _ in columns]
                made += [columns[0].new_zeros(width, dtype=torch.float64) for _ in columns]
                self._sums.append(made)
            sums = self._sums[k]
            for x, total, mean in zip(
                columns, sums[: len(columns)], sums[len(columns) :], strict=True
            ):
                if total.dtype == torch.float32:
                    total.addmm_(x.t(), columns[0])
                else:
                    total += x.t() @ columns[0]
                mean += x.sum(0)

    def parts(self) -> list[Moments]:
        """The means, of each block; the sums are handed over, so this ends the gathering.

        RoundingError without any rows.
        """
        if not self.rows:
            raise RoundingError("it got no inputs from any of the states")
        sums, self._sums = self._sums, []
        return [_moments([total.div_(self.rows) for total in block], self.rows) for block in sums]

    def moments(self) -> Moments:
        """The same where nothing is cut."""
        (made,) = self.parts()
        return made


def _moments(means: Sequence[torch.Tensor], rows: int) -> Moments:
    """Of one stream or of two."""
    if len(means) == 2:
        h, mean = means
        return Moments(h, None, mean, mean, rows)
    return Moments(*means, rows)


@contextmanager
def damping(h: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Inside, ``h`` has ``share`` of its mean diagonal added to its diagonal: safe to invert."""
    diagonal = h.diagonal()
    before = diagonal.clone()
    diagonal.add_(share * before.mean())
    try:
        yield h
    finally:
        diagonal.copy_(before)


def placed(parts: Sequence[Moments]) -> Iterator[tuple[slice, Moments]]:
    """Each block with the columns that it is of."""
    start = 0
    for part in parts:
        stop = start + len(part.mean_q)
        yield slice(start, stop), part
        start = stop
