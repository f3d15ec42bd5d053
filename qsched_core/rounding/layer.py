"""Calibrated rounding of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..formats.base import FormatError, Packed
from .errors import RoundingError
from .grid import Grid
from .moments import Moments, damping, placed
from .solve import (
    Check,
    Rounded,
    descend,
    energy_of,
    error_to,
    fitted_rows,
    gptq,
    joined,
    nothing,
    refit,
)


@dataclass(frozen=True)
class RoundingSettings:
    """How weights are fitted; the defaults are what served the demo model best.

    ``damp`` and ``target_damp`` are shares of the inputs' mean energy that are added to every input's
    in GPTQ and in the target; ``target`` is how much of the earlier layers' error a layer takes up
    (0: none; None: what serves its format).  ``rounds`` of table refit and ``sweeps`` of coordinate
    descent follow GPTQ.  RoundingError for a value that is out of range.
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
    rounded plainly, "" if it was calibrated.  ``remark`` says what was simplified for want of memory.
    """

    packed: Packed
    bias: torch.Tensor | None
    plain_error: float | None = None
    error: float | None = None
    note: str = ""
    remark: str = ""

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
    moments: Moments | Sequence[Moments],
    settings: RoundingSettings | None = None,
    shift: torch.Tensor | None = None,
    *,
    spend: bool = False,
    check: Check = nothing,
) -> Calibrated:
    """weight [out, in] and bias [out] rounded so that the layer's output errs least.

    ``moments`` are of what ``grid.pair`` gives.  The weight that comes nearest to the unquantized
    output on the quantized model's inputs (QEP, arXiv 2504.09629) is rounded by GPTQ, then tables
    and levels are improved in turn as long as the output error falls; a bias, where there is one,
    takes up what is left of the mean.  ``shift`` [in] was taken off the quantized model's inputs:
    the bias gives its product back.  Rounded plainly, with a note, are layers whose inputs are all
    zero or singular beyond damping, and those that would not gain.

    Several ``moments`` are of consecutive columns, which then are rounded as if no input of one
    went with one of another.  With ``spend`` their memory is worked in, and their values are gone.
    ``check`` is called for every block of 128 columns; what it raises ends the work.
    RoundingError for NaN or infinite inputs, FormatError for such a weight.
    """
    settings = settings or RoundingSettings()
    grid.form.check(weight)
    parts = [moments] if isinstance(moments, Moments) else list(moments)
    if not all(part.is_finite for part in parts):
        raise RoundingError(
            "its inputs are NaN or infinite on some of the states; compute the model in bf16 or fp32"
        )
    if not torch.isfinite(weight).all():
        raise FormatError("the weight has NaN or infinite values; use a sound copy")
    if not spend:
        parts = [part.copied() for part in parts]
    before = sum(_trace(part.h) for part in parts)
    if bias is not None:
        for part in parts:
            part.centre()
    # Of sums, where all inputs are one value.
    noise = 8 * torch.finfo(parts[0].h.dtype).eps * before
    if before <= 0 or sum(_trace(part.h) for part in parts) <= noise:
        return plain(grid, weight, bias, "its inputs never change", shift=shift)
    matrix = weight.detach().float().flatten(1)
    grid = grid.fitted(matrix)
    whole = grid.turned(matrix)
    apart = grid.apart
    # Where the branch's inputs are not the codes' own, its product is no concern of theirs.
    own = apart if grid.weight_only else None
    rest = whole if apart is None or grid.weight_only else whole - apart
    try:
        goal, wanted = _goal(rest, parts, settings, grid)
        goal = _sum(goal, own, -1)
        rounded = _improved(grid, goal, parts, settings, check)
    except torch.linalg.LinAlgError:
        return plain(grid, weight, bias, "its inputs are singular", shift=shift)
    first = plain(grid, weight, bias, "plain rounding is as good", shift=shift)
    plainly = _sum(grid.turned(grid.form.dequantize(first.packed).flatten(1)), apart, -1)
    values = rounded.values()
    plain_error, error = (
        _error(_sum(goal, apart), _sum(v, apart), parts) ** 0.5 for v in (plainly, values)
    )
    losses = [_loss(_sum(v, own), parts, wanted) for v in (plainly, values)]
    if not torch.isfinite(values).all() or losses[1] > losses[0]:
        return replace(first, plain_error=plain_error, error=plain_error)
    if bias is not None:
        q, fp = (torch.cat([getattr(part, n) for part in parts]) for n in ("mean_q", "mean_fp"))
        change = _product(rest, fp) - _product(_sum(values, own), q)
        if shift is not None and apart is not None:  # both means are without the shift
            change += _product(whole, shift.double())
        bias = (bias.detach().double() + change).to(bias.dtype)
    packed = replace(rounded.packed(), shape=tuple(weight.shape))
    remark = "" if len(parts) == 1 else f"its statistics are cut into {_blocks(parts)}"
    return Calibrated(packed, bias, plain_error, error, remark=remark)


def _trace(h: torch.Tensor) -> float:
    return float(h.diagonal().sum())


def _sum(one: torch.Tensor, other: torch.Tensor | None, times: float = 1) -> torch.Tensor:
    """``one`` and ``times`` the other, if there is one."""
    return one if other is None else one.add(other, alpha=times)


def _blocks(parts: Sequence[Moments]) -> str:
    return f"{len(parts)} blocks of {max(len(part.mean_q) for part in parts)} columns at most"


def _product(weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """``weight`` @ ``mean`` in fp64, without an fp64 copy of the whole weight."""
    return torch.cat([rows.double() @ mean for rows in weight.split(1024)])


def _goal(weight: torch.Tensor, parts: Sequence[Moments], settings: RoundingSettings, grid: Grid):
    """The weight that on the quantized model's inputs comes nearest to the unquantized output.

    W* = W (s C + (1 - s) H + d) (H + d)^-1 with s = ``target`` and d the damping.  And W C of each
    part, all that the loss needs of C, which is let go.
    """
    target = grid.target if settings.target is None else settings.target
    goals, wanted = [], []
    for columns, part in placed(parts):
        w = weight[:, columns].to(part.h.dtype)
        alike = part.cross is None
        wanted.append(w @ (part.h if alike else part.cross))
        part.cross = None
        if target and not alike:
            change = torch.addmm(wanted[-1], w, part.h, alpha=-1).mul_(target)
            with damping(part.h, settings.target_damp):
                factor = torch.linalg.cholesky(part.h)
            w = w + torch.cholesky_solve(change.t(), factor).t()
            del factor
        goals.append(w.float())
    return goals[0] if len(goals) == 1 else torch.cat(goals, 1), wanted


def _improved(grid: Grid, goal, parts, settings: RoundingSettings, check: Check) -> Rounded:
    """``goal`` rounded, block by block of its columns."""
    if len(parts) == 1:
        return _improved_block(grid, goal, parts[0].h, settings, check)
    common, tables = grid.common(goal), None
    if grid.group_size(goal.shape[1]) > max(len(part.mean_q) for part in parts):
        energy = torch.cat([part.h.diagonal().float() for part in parts])
        tables = fitted_rows(grid, goal, energy, common)  # of whole rows: no block may change them
    made = [
        _improved_block(
            grid, goal[:, columns].contiguous(), part.h, settings, check, common, tables
        )
        for columns, part in placed(parts)
    ]
    return joined(made, tables)


def _improved_block(grid, goal, h, settings, check, common=None, tables=None) -> Rounded:
    best = now = gptq(grid, goal, h, settings.damp, common, tables, check)
    least = error_to(goal, best.values(), h)
    for _ in range(settings.rounds):
        with damping(h, settings.damp):
            safe = h.float()
            if tables is None:
                now = refit(now, goal, safe, check)
            now = descend(now, goal, safe, settings.sweeps, check)
        error = error_to(goal, now.values(), h)
        if error < least:
            best, least = now, error
    return best


def _error(goal: torch.Tensor, values: torch.Tensor, parts: Sequence[Moments]) -> float:
    """As :func:`error_to`, over all blocks."""
    wrong = whole = 0.0
    for columns, part in placed(parts):
        wrong += energy_of(goal[:, columns] - values[:, columns], part.h)
        whole += energy_of(goal[:, columns], part.h)
    return max(0.0, wrong) / whole if whole > 0 else 0.0


def _loss(values: torch.Tensor, parts: Sequence[Moments], wanted) -> float:
    """E|W x_fp - V x_q|^2 without E|W x_fp|^2, which no rounding changes."""
    total = 0.0
    for (columns, part), aim in zip(placed(parts), wanted, strict=True):
        v = values[:, columns].to(aim.dtype)
        total += float(((v @ part.h).sub_(aim, alpha=2) * v).sum(dtype=torch.float64))
    return total
