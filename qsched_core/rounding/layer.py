"""Calibrated rounding of one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..formats.base import FormatError, Packed
from .errors import RoundingError
from .grid import Grid
from .moments import Moments, damped
from .solve import Rounded, descend, error_to, gptq, refit


@dataclass(frozen=True)
class RoundingSettings:
    """How weights are fitted; the defaults are what served the demo model best.

    ``damp`` and ``target_damp`` are shares of the inputs' mean energy that are added to every input's
    in GPTQ and in the target; ``target`` is how much of the earlier layers' error a layer takes up
    (0: none; None: what serves its format).  ``rounds`` of table refit and ``sweeps`` of coordinate descent follow GPTQ.
    RoundingError for a value that is out of range.
    """

    damp: float = 0.01
    target_damp: float = 0.05
    target: float | None = None
    rounds: int = 2
    sweeps: int = 2

    def __post_init__(self):
        for name, low, high in (("damp", 1e-6, 10), ("target_damp", 1e-6, 10), ("target", 0, 1)):
            value = getattr(self, name)
            if value is None and name == "target":
                continue
            if not low <= value <= high:
                raise RoundingError(f"{name}={value} must be {low} to {high}")
        for name in ("rounds", "sweeps"):
            if not 0 <= getattr(self, name) <= 100:
                raise RoundingError(f"{name}={getattr(self, name)} must be 0 to 100")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Calibrated:
    """A rounded layer: its packing and bias [out] (None: it has none).

    ``plain_error`` and ``error`` are what plain and calibrated rounding miss of the output that the
    layer could reach, root of the mean square over the output's; ``note`` says why the layer was
    rounded plainly, "" if it was calibrated.
    """

    packed: Packed
    bias: torch.Tensor | None
    plain_error: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def errors(self) -> tuple[float, float] | None:
        """``plain_error`` and ``error`` of a layer that is calibrated; None for another."""
        return None if self.note or self.error is None else (self.plain_error, self.error)

    def to(self, device: torch.device | str) -> Calibrated:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, packed=self.packed.to(device), bias=bias)


def plain(
    grid_or_form,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    note: str,
    shift: torch.Tensor | None = None,
) -> Calibrated:
    """The format's own rounding, which knows no inputs; ``shift`` as in :func:`calibrate_layer`."""
    form = grid_or_form.form if isinstance(grid_or_form, Grid) else grid_or_form
    packed = form.quantize(weight)
    if shift is not None:
        back = form.dequantize(packed).double() @ shift.double()
        bias = (bias.detach().double() + back).to(bias.dtype)
    return Calibrated(packed, bias, note=note)


@torch.no_grad()
def calibrate_layer(
    grid: Grid,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    moments: Moments,
    settings: RoundingSettings | None = None,
    shift: torch.Tensor | None = None,
) -> Calibrated:
    """weight [out, in] and bias [out] rounded so that the layer's output errs least.

    ``moments`` are of what ``grid.pair`` gives.  The weight that comes nearest to the unquantized
    output on the quantized model's inputs
    (QEP, arXiv 2504.09629) is rounded by GPTQ, then tables and levels are improved in turn as long as
    the output error falls; a bias, where there is one, takes up what is left of the mean.  ``shift``
    [in] was taken off the quantized model's inputs: the bias gives its product back.  Rounded
    plainly, with a note, are layers whose inputs are all zero or singular beyond damping, and those
    that would not gain.  RoundingError for NaN or infinite inputs, FormatError for such a weight.
    """
    settings = settings or RoundingSettings()
    grid.form.check(weight)
    if not moments.is_finite:
        raise RoundingError(
            "its inputs are NaN or infinite on some of the states; compute the model in bf16 or fp32"
        )
    if not torch.isfinite(weight).all():
        raise FormatError("the weight has NaN or infinite values; use a sound copy")
    seen = moments if bias is None else moments.centred()
    if float(moments.h.diagonal().sum()) <= 0 or float(seen.h.diagonal().sum()) <= 0:
        return plain(grid, weight, bias, "its inputs never change", shift=shift)
    matrix = weight.detach().float().flatten(1)
    grid = grid.fitted(matrix)
    whole = grid.turned(matrix)
    apart = torch.zeros_like(whole) if grid.apart is None else grid.apart
    # Where the branch's inputs are not the codes' own, its product is no concern of theirs.
    own = apart if grid.weight_only else torch.zeros_like(whole)
    rest = whole - apart + own
    try:
        goal = _goal(rest, seen, settings, grid) - own
        rounded = _improved(grid, goal, seen.h, settings)
    except torch.linalg.LinAlgError:
        return plain(grid, weight, bias, "its inputs are singular", shift=shift)
    first = plain(grid, weight, bias, "plain rounding is as good", shift=shift)
    before = grid.turned(grid.form.dequantize(first.packed).flatten(1)) - apart
    values = rounded.values()
    plain_error, error = (
        error_to(goal + apart, v + apart, seen.h) ** 0.5 for v in (before, values)
    )
    losses = [_loss(rest, v + own, seen) for v in (before, values)]
    if not torch.isfinite(values).all() or losses[1] > losses[0]:
        return replace(first, plain_error=plain_error, error=plain_error)
    if bias is not None:
        q, fp = moments.mean_q, moments.mean_fp
        change = rest.double() @ fp - (values + own).double() @ q
        if shift is not None and grid.apart is not None:  # both means are without the shift
            change += whole.double() @ shift.double()
        bias = (bias.detach().double() + change).to(bias.dtype)
    packed = replace(rounded.packed(), shape=tuple(weight.shape))
    return Calibrated(packed, bias, plain_error, error)


def _goal(
    weight: torch.Tensor, moments: Moments, settings: RoundingSettings, grid: Grid
) -> torch.Tensor:
    """The weight that on the quantized model's inputs comes nearest to the unquantized output.

    W* = W (s C + (1 - s) H + d) (H + d)^-1 with s = ``target`` and d the damping.
    """
    target = grid.target if settings.target is None else settings.target
    if not target:
        return weight
    h = damped(moments.h, settings.target_damp)
    change = target * (weight.double() @ (moments.cross - moments.h))
    factor = torch.linalg.cholesky(h)
    return weight + torch.cholesky_solve(change.t(), factor).t().float()


def _improved(grid: Grid, goal, h, settings: RoundingSettings) -> Rounded:
    best = now = gptq(grid, goal, h, settings.damp)
    least = error_to(goal, best.values(), h)
    safe = damped(h, settings.damp).float()
    for _ in range(settings.rounds):
        now = descend(refit(now, goal, safe), goal, safe, settings.sweeps)
        error = error_to(goal, now.values(), h)
        if error < least:
            best, least = now, error
    return best


def _loss(weight: torch.Tensor, values: torch.Tensor, moments: Moments) -> float:
    """E|W x_fp - V x_q|^2 without E|W x_fp|^2, which no rounding changes."""
    v = values.double()
    return float(((v @ moments.h) * v).sum() - 2 * ((weight.double() @ moments.cross) * v).sum())
