"""Rounding a matrix on a grid so that its product errs least, not its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats.base import Packed, grouped
from .grid import Grid, Tables, padded
from .moments import damping

BLOCK = 128  # columns whose errors are fed back together
CHUNK_ELEMENTS = 1 << 24  # weights whose rows are worked on at a time
REFIT_ELEMENTS = 1 << 24  # numbers of a refit's temporaries at a time
INVERTED = 1024  # columns of a factor that are inverted at a time

Check = Callable[[], None]  # called now and then; may raise, to stop the work


def nothing() -> None:
    """Goes on."""


@dataclass(frozen=True)
class Rounded:
    """Levels [rows, padded columns] and the stored tables of one weight of ``columns`` columns."""

    grid: Grid
    levels: torch.Tensor
    tables: Tables
    common: torch.Tensor | None
    columns: int

    def lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [rows, groups], fp32, as stored."""
        return self.grid.stored(self.tables, self.common)

    def padded_values(self) -> torch.Tensor:
        scale, zero = (t.unsqueeze(2) for t in self.lines())
        groups = self.levels.view(*scale.shape[:2], -1)
        return ((groups - zero) * scale).flatten(1)

    def values(self) -> torch.Tensor:
        """The weight [rows, columns] that is stored."""
        return self.padded_values()[:, : self.columns]

    def rows(self, part: slice) -> Rounded:
        """Some of its rows."""
        tables = {name: table[part] for name, table in self.tables.items()}
        return replace(self, levels=self.levels[part], tables=tables)

    def packed(self) -> Packed:
        """The format's own packing of it."""
        return self.grid.pack(self.levels, self.tables, self.common, self.columns)


def gptq(
    grid: Grid,
    weight: torch.Tensor,
    h: torch.Tensor,
    damp: float,
    common: torch.Tensor | None = None,
    tables: Tables | None = None,
    check: Check = nothing,
) -> Rounded:
    """GPTQ (arXiv 2210.17323) of weight [rows, columns], fp32, in the grid's own groups.

    A group's tables are fitted when its first column is reached, to the weights as the feedback left
    them, each counting with its input's energy.  ``common`` (else the weight's own) and ``tables`` of
    whole rows may be given: where ``weight`` is some columns of a larger one.  ``check`` is called
    for every block of columns.  torch.linalg.LinAlgError if ``h``, with ``damp`` of its mean diagonal,
    is not positive definite.
    """
    columns, size = weight.shape[1], grid.group_size(weight.shape[1])
    common = grid.common(weight) if common is None else common
    energy, feedback = _feedback(h, damp, columns + -columns % size, check)
    made = []
    for rows in _row_chunks(weight):
        given = None if tables is None else {name: t[rows] for name, t in tables.items()}
        left = padded(weight[rows], size).clone()
        made.append(_fed_back(grid, left, energy, feedback, common, given, check))
    levels = torch.cat([part[0] for part in made])
    joined = {name: torch.cat([part[1][name] for part in made]) for name in made[0][1]}
    return Rounded(grid, levels, joined, common, columns)


def _row_chunks(weight: torch.Tensor) -> list[slice]:
    """Rows that are worked on at a time: it bounds the temporaries."""
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def fitted_rows(grid: Grid, weight: torch.Tensor, energy: torch.Tensor, common) -> Tables:
    """Tables of groups fitted to ``weight`` as it is, each value counting with ``energy`` [columns]."""
    size = grid.group_size(weight.shape[1])
    counts = torch.nn.functional.pad(energy, (0, -len(energy) % size)).view(-1, size)
    return grid.fit(grouped(padded(weight, size), size), counts, common)


def _fed_back(grid: Grid, left, energy, feedback, common, tables, check: Check):
    """Levels and tables of some rows, which are ``left`` and are overwritten."""
    rows, columns = left.shape
    size = grid.group_size(columns)
    levels = torch.empty_like(left)
    block = max(BLOCK // size * size, min(size, BLOCK))
    in_turn = tables is None and size <= block  # a longer group is fitted before any feedback
    if tables is None and not in_turn:
        tables = fitted_rows(grid, left, energy, common)
    parts: list[Tables] = []
    for start in range(0, columns, block):
        check()
        stop = min(columns, start + block)
        part, errors = left[:, start:stop].clone(), left.new_empty(rows, stop - start)
        for i in range(stop - start):
            column = start + i
            if column % size == 0 and in_turn:
                counts = energy[column : column + size].view(1, size)
                parts.append(grid.fit(part[:, i : i + size].unsqueeze(1), counts, common))
                scale, zero = (t[:, 0] for t in grid.stored(parts[-1], common))
            elif column % size == 0 or i == 0:
                scale, zero = (t[:, column // size] for t in grid.stored(tables, common))
            level = grid.nearest(part[:, i] / scale + zero)
            levels[:, column] = level
            errors[:, i] = (part[:, i] - (level - zero) * scale) / feedback[column, column]
            if column + 1 < stop:
                part[:, i + 1 :].addr_(errors[:, i], feedback[column, column + 1 : stop], alpha=-1)
        if stop < columns:
            left[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    if in_turn:
        tables = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return levels, tables


def _feedback(h, damp: float, columns: int, check: Check) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of the inputs, and the Cholesky factor of the inverse, padded to ``columns``.

    With rows and columns in reverse, the factor of the inverse is the inverse of the factor.
    """
    with damping(h, damp):
        energy, flipped = h.diagonal().float(), h.flip(0, 1)
        energy = energy.clone()  # fp32 is no copy
    lower = torch.linalg.cholesky(flipped)
    del flipped
    inverse = torch.zeros_like(lower)
    for start in range(0, len(h), INVERTED):
        check()
        stop = min(len(h), start + INVERTED)
        unit = torch.eye(len(h) - start, stop - start, dtype=h.dtype, device=h.device)
        below = lower[start:, start:]
        inverse[start:, start:stop] = torch.linalg.solve_triangular(below, unit, upper=False)
    del lower
    factor = inverse.flip(0, 1).float()
    more = columns - len(h)
    if not more:
        return energy, factor
    wide = torch.eye(columns, device=h.device)
    wide[: len(h), : len(h)] = factor
    return torch.nn.functional.pad(energy, (0, more)), wide


def joined(parts: Sequence[Rounded], tables: Tables | None) -> Rounded:
    """Consecutive columns as one; ``tables`` are theirs if they share them."""
    first = parts[0]
    if tables is None:
        tables = {
            name: torch.cat([part.tables[name] for part in parts], 1) for name in first.tables
        }
    levels = torch.cat([part.levels for part in parts], 1)
    return Rounded(first.grid, levels, tables, first.common, sum(part.columns for part in parts))


def refit(
    rounded: Rounded, weight: torch.Tensor, h: torch.Tensor, check: Check = nothing
) -> Rounded:
    """Tables of least squared output error for the levels as they are, then stored.

    ``h`` [columns, columns] fp32, damped.  A scale that would change sign or shrink below a third is
    kept.
    """
    grid, size = rounded.grid, rounded.grid.group_size(rounded.columns)
    scale, zero = rounded.lines()
    rows, groups = scale.shape
    extra = rounded.levels.shape[1] - rounded.columns
    wide = torch.nn.functional.pad(h, (0, extra, 0, extra)) if extra else h
    weight = padded(weight, size)
    new_scale, new_zero = scale.clone(), zero.clone()
    step = max(1, REFIT_ELEMENTS // (groups * wide.shape[1] + 8 * groups * groups))
    for start in range(0, rows, step):
        check()
        part = slice(start, start + step)
        found, low = _least_squares(rounded.levels[part], weight[part], wide, groups, grid.zeros)
        fine = found / scale[part] > 0.3
        new_scale[part] = torch.where(fine, found, scale[part])
        if grid.zeros:
            fresh = (-low / found).clamp(grid.levels[0], grid.levels[-1])
            new_zero[part] = torch.where(fine, fresh, zero[part])
    return replace(rounded, tables=grid.store(new_scale, new_zero, rounded.common))


def _least_squares(levels, weight, h, groups: int, zeros: bool):
    """Scale and low end [rows, groups] of each group that bring scale * level + low nearest in h."""
    rows, columns = levels.shape
    size = columns // groups
    codes = levels.view(rows, groups, size)
    by_group = h.view(groups, size, columns)
    reached = torch.einsum("rgk,gkj->rgj", codes, by_group)  # of each group, at every column
    wanted = (weight @ h).view(rows, groups, size)
    normal = (reached * levels.unsqueeze(1)).view(rows, groups, groups, size).sum(3)
    right = (wanted * codes).sum(2)
    if zeros:
        cross = reached.view(rows, groups, groups, size).sum(3)
        ones = by_group.sum(1).view(groups, groups, size).sum(2).expand(rows, -1, -1)
        top = torch.cat([normal, cross], 2)
        normal = torch.cat([top, torch.cat([cross.transpose(1, 2), ones], 2)], 1)
        right = torch.cat([right, wanted.sum(2)], 1)
    normal = normal.double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
    found = torch.linalg.solve(normal, right.double().unsqueeze(2)).squeeze(2).float()
    return found[:, :groups], found[:, groups:]


def descend(
    rounded: Rounded, weight: torch.Tensor, h: torch.Tensor, sweeps: int, check: Check = nothing
) -> Rounded:
    """Coordinate descent on the levels: each to its best, all others as they are.

    ``h`` and ``check`` as for :func:`refit`.  Padding stays as it is.
    """
    levels, diagonal = rounded.levels.clone(), h.diagonal().tolist()
    for rows in _row_chunks(weight):
        _descend(rounded.rows(rows), weight[rows], h, diagonal, levels[rows], sweeps, check)
    return replace(rounded, levels=levels)


def _descend(rounded: Rounded, weight, h, diagonal, levels, sweeps: int, check: Check) -> None:
    """The same for some rows, whose ``levels`` are overwritten."""
    grid, size = rounded.grid, rounded.grid.group_size(rounded.columns)
    scale, zero = rounded.lines()
    values = rounded.values().clone()
    slope = (weight - values) @ h
    for _ in range(sweeps):
        for start in range(0, rounded.columns, BLOCK):
            check()
            stop = min(rounded.columns, start + BLOCK)
            inside, before = slope[:, start:stop].clone(), values[:, start:stop].clone()
            for j in range(start, stop):
                a, b = scale[:, j // size], zero[:, j // size]
                target = values[:, j] + inside[:, j - start] / diagonal[j]
                levels[:, j] = grid.nearest(target / a + b)
                new = (levels[:, j] - b) * a
                inside.addr_(new - values[:, j], h[j, start:stop], alpha=-1)
                values[:, j] = new
            slope.addmm_(values[:, start:stop] - before, h[start:stop], alpha=-1)


def energy_of(weight: torch.Tensor, h: torch.Tensor) -> float:
    """Mean square of the output of ``weight`` [rows, columns], summed over its rows."""
    h, total = h.float(), 0.0
    for rows in _row_chunks(weight):
        part = weight[rows]
        total += float(((part @ h) * part).sum(dtype=torch.float64))
    return total


def error_to(goal: torch.Tensor, values: torch.Tensor, h: torch.Tensor) -> float:
    """Mean squared output error of ``values`` against ``goal``, over the goal's mean square."""
    wrong, whole = energy_of(goal - values, h), energy_of(goal, h)
    return max(0.0, wrong) / whole if whole > 0 else 0.0
