"""Rounding a matrix on a grid so that its product errs least, not its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..formats.base import Packed, grouped
from .grid import Grid, Tables, padded
from .moments import damped

BLOCK = 128  # columns whose errors are fed back together
REFIT_ELEMENTS = 1 << 24  # numbers of a refit's temporaries at a time


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

    def packed(self) -> Packed:
        """The format's own packing of it."""
        return self.grid.pack(self.levels, self.tables, self.common, self.columns)


def gptq(grid: Grid, weight: torch.Tensor, h: torch.Tensor, damp: float) -> Rounded:
    """GPTQ (arXiv 2210.17323) of weight [rows, columns], fp32, in the grid's own groups.

    A group's tables are fitted when its first column is reached, to the weights as the feedback left
    them, each counting with its input's energy.  torch.linalg.LinAlgError if ``h``, with ``damp`` of
    its mean diagonal, is not positive definite.
    """
    rows, columns = weight.shape
    size, common = grid.group_size(columns), grid.common(weight)
    left = padded(weight, size).clone()
    energy, feedback = _feedback(h, damp, left.shape[1])
    levels = torch.empty_like(left)
    block = max(BLOCK // size * size, min(size, BLOCK))
    in_turn = size <= block  # a longer group is fitted before any feedback
    tables: Tables = {}
    if not in_turn:
        tables = grid.fit(grouped(left, size), energy.view(-1, size), common)
    parts: list[Tables] = []
    for start in range(0, left.shape[1], block):
        stop = min(left.shape[1], start + block)
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
        if stop < left.shape[1]:
            left[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    if in_turn:
        tables = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return Rounded(grid, levels, tables, common, columns)


def _feedback(h: torch.Tensor, damp: float, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of the inputs, and the Cholesky factor of the inverse, padded to ``columns``."""
    safe = damped(h, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(safe))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    more = columns - len(h)
    if not more:
        return safe.diagonal().float(), factor
    wide = torch.eye(columns, device=h.device)
    wide[: len(h), : len(h)] = factor
    return torch.nn.functional.pad(safe.diagonal().float(), (0, more)), wide


def refit(rounded: Rounded, weight: torch.Tensor, h: torch.Tensor) -> Rounded:
    """Tables of least squared output error for the levels as they are, then stored.

    ``h`` [columns, columns] fp32, damped.  A scale that would change sign or shrink below a third is
    kept.
    """
    grid, size = rounded.grid, rounded.grid.group_size(rounded.columns)
    scale, zero = rounded.lines()
    rows, groups = scale.shape
    extra = rounded.levels.shape[1] - rounded.columns
    wide = torch.nn.functional.pad(h, (0, extra, 0, extra))
    weight = padded(weight, size)
    new_scale, new_zero = scale.clone(), zero.clone()
    step = max(1, REFIT_ELEMENTS // (groups * wide.shape[1] + 8 * groups * groups))
    for start in range(0, rows, step):
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


def descend(rounded: Rounded, weight: torch.Tensor, h: torch.Tensor, sweeps: int) -> Rounded:
    """Coordinate descent on the levels: each to its best, all others as they are.

    ``h`` as for :func:`refit`.  Padding stays as it is.
    """
    grid, size = rounded.grid, rounded.grid.group_size(rounded.columns)
    scale, zero = rounded.lines()
    values, levels = rounded.values().clone(), rounded.levels.clone()
    slope = (weight - values) @ h
    diagonal = h.diagonal().tolist()
    for _ in range(sweeps):
        for start in range(0, rounded.columns, BLOCK):
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
    return replace(rounded, levels=levels)


def error_to(goal: torch.Tensor, values: torch.Tensor, h: torch.Tensor) -> float:
    """Mean squared output error of ``values`` against ``goal``, over the goal's mean square."""
    h = h.float()
    left = goal - values
    wrong = float(((left @ h) * left).sum(dtype=torch.float64))
    whole = float(((goal @ h) * goal).sum(dtype=torch.float64))
    return max(0.0, wrong) / whole if whole > 0 else 0.0
