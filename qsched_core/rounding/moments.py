"""Second moments of a layer's inputs: all that rounding needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import RoundingError


@dataclass(frozen=True)
class Moments:
    """Means over a layer's input rows, fp64, on the device of the model.

    ``h`` [in, in] is E[x_q x_q^T] of the inputs that the quantized model gives the layer, ``cross``
    [in, in] E[x_fp x_q^T] with those of the unquantized one; ``mean_q`` and ``mean_fp`` [in] their
    means, ``rows`` how many rows there were.
    """

    h: torch.Tensor
    cross: torch.Tensor
    mean_q: torch.Tensor
    mean_fp: torch.Tensor
    rows: int

    def centred(self) -> Moments:
        """The same around the means: what is left to the weight when a bias takes the means up."""
        h = self.h - torch.outer(self.mean_q, self.mean_q)
        cross = self.cross - torch.outer(self.mean_fp, self.mean_q)
        return Moments(h, cross, self.mean_q, self.mean_fp, self.rows)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.h.sum()) and torch.isfinite(self.cross.sum()))


class Gathering:
    """Adds up moments batch by batch: products in fp32, their sums in fp64.

    Sums in 16 bits would leave matrices that are not positive definite.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self.rows = 0

    def add(self, x_q: torch.Tensor, x_fp: torch.Tensor) -> None:
        """Inputs [..., in] of the quantized and of the unquantized model, row by row the same place."""
        if x_q.shape != x_fp.shape:
            raise RoundingError(
                f"the quantized model gives it inputs {list(x_q.shape)}, the unquantized one "
                f"{list(x_fp.shape)}; a model whose shapes depend on its values can't be calibrated"
            )
        q, fp = (x.reshape(-1, x.shape[-1]).float() for x in (x_q, x_fp))
        parts = [q.t() @ q, fp.t() @ q, q.sum(0), fp.sum(0)]
        if not self._sums:
            self._sums = [part.double() for part in parts]
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total += part
        self.rows += len(q)

    def moments(self) -> Moments:
        """The means so far; RoundingError without any rows."""
        if not self.rows:
            raise RoundingError("it got no inputs from any of the states")
        return Moments(*(total / self.rows for total in self._sums), self.rows)


def damped(h: torch.Tensor, share: float) -> torch.Tensor:
    """``h`` with ``share`` of its mean diagonal added to its diagonal: safe to invert."""
    h = h.clone()
    h.diagonal().add_(share * h.diagonal().mean())
    return h
