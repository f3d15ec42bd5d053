"""Noise levels by dynamic programming: the best few steps over the levels of a fine path.

BOSS (arXiv 2312.16414, section 3): the cost of the edge from level i to level j is how far one step
from the fine path's latent x_i ends from its x_j, and Bellman's recursion finds the path of K edges
with the least sum.  BOSS then finetunes the model; here each edge has the numbers of a correction
instead, which are least squares, as Euler's corrected step is linear in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ..correction import DEFAULT, Correction
from ..validation import ScheduleError

MOST_STEPS = 16
_RIDGE = 1e-12  # relative: keeps a system solvable where two columns are the same


@dataclass(frozen=True)
class Fit:
    """Least-squares problems, each | B n - y |^2 over the numbers n of one correction step.

    ``gram`` [..., numbers, numbers] is B'B, ``moment`` [..., numbers] is B'y and ``energy`` [...]
    is y'y, all in float64.  Problems of other samples are added.
    """

    gram: torch.Tensor
    moment: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def of(cls, basis: torch.Tensor, target: torch.Tensor) -> Fit:
        """From B [*shape, numbers], of ``Correction.euler_basis``, and the target y [*shape]."""
        columns = basis.double().flatten(0, -2)
        wanted = target.double().flatten()
        return cls(columns.T @ columns, columns.T @ wanted, wanted @ wanted)

    @classmethod
    def stack(cls, fits: Sequence[Fit]) -> Fit:
        return cls(
            *(torch.stack([getattr(f, k) for f in fits]) for k in ("gram", "moment", "energy"))
        )

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.gram + other.gram, self.moment + other.moment, self.energy + other.energy)

    def cost(self, numbers: torch.Tensor) -> torch.Tensor:
        """| B n - y |^2 [...] of numbers [..., numbers]; never below 0."""
        moved = (self.gram @ numbers.unsqueeze(-1)).squeeze(-1)
        cost = ((moved - 2 * self.moment) * numbers).sum(-1) + self.energy
        return cost.clamp(min=0)

    def solve(self, correction: type[Correction] = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
        """The best numbers [..., numbers] that ``correction`` may hold, and their cost [...].

        The optimum of a convex problem in a box: every choice of numbers that lie on a bound is
        tried, the others solve their linear system.
        """
        low = [p.low for p in correction.parameters]
        high = [p.high for p in correction.parameters]
        best_cost = torch.full_like(self.energy, torch.inf)
        best = torch.empty_like(self.moment)
        bounds = torch.tensor([low, high], dtype=torch.float64)
        for sides in product((None, 0, 1), repeat=len(low)):
            numbers = self._with_fixed(sides, bounds)
            inside = ((numbers >= bounds[0] - 1e-9) & (numbers <= bounds[1] + 1e-9)).all(-1)
            numbers = numbers.clamp(bounds[0], bounds[1])
            cost = self.cost(numbers)
            better = inside & (cost < best_cost)
            best_cost = torch.where(better, cost, best_cost)
            best = torch.where(better.unsqueeze(-1), numbers, best)
        return best, best_cost

    def _with_fixed(self, sides: Sequence[int | None], bounds: torch.Tensor) -> torch.Tensor:
        """The optimum with the numbers on the given ``sides`` of the box; None is free."""
        free = [k for k, side in enumerate(sides) if side is None]
        fixed = [k for k, side in enumerate(sides) if side is not None]
        numbers = torch.zeros_like(self.moment)
        for k in fixed:
            numbers[..., k] = bounds[sides[k], k]
        if free:
            gram = self.gram[..., free, :][..., free]
            moment = self.moment[..., free]
            if fixed:
                cross = self.gram[..., free, :][..., fixed]
                moment = moment - (cross @ numbers[..., fixed].unsqueeze(-1)).squeeze(-1)
            scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp(min=1e-300)
            eye = torch.eye(len(free), dtype=torch.float64)
            numbers[..., free] = torch.linalg.solve(gram + _RIDGE * scale * eye, moment)
        return numbers


def edges(
    latents: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    sigmas: Sequence[float],
    correction: type[Correction] = DEFAULT,
) -> Fit:
    """Every edge of a fine path: fits [edges] from level i to level j > i, i slowest.

    ``latents`` [levels] are x_i and ``outputs`` [levels - 1] the guided clean predictions at them,
    each [prompts, ...]; ``sigmas`` [levels] fall.  ScheduleError for a correction whose step is not
    linear in its numbers.
    """
    found = []
    for i, output in enumerate(outputs):
        for j in range(i + 1, len(sigmas)):
            basis = correction.euler_basis(latents[i], output, sigmas[i], sigmas[j])
            if basis is None:
                raise ScheduleError(
                    f"noise levels can't be learned by dynamic programming with a correction of "
                    f"kind {correction.kind!r}: its step is not linear in its numbers"
                )
            found.append(Fit.of(basis, latents[j]))
    return Fit.stack(found)


def square(values: torch.Tensor, levels: int) -> torch.Tensor:
    """Values [edges, ...] of :func:`edges` as [levels - 1, levels, ...]; infinite where j <= i."""
    out = values.new_full((levels - 1, levels, *values.shape[1:]), torch.inf)
    rows, columns = torch.triu_indices(levels - 1, levels, 1)
    out[rows, columns] = values
    return out


@dataclass(frozen=True)
class GridPath:
    """Positions on the fine grid, from its first to its last, and the summed cost of their edges."""

    positions: tuple[int, ...]
    cost: float


def best_paths(cost: torch.Tensor, most: int = MOST_STEPS) -> tuple[GridPath, ...]:
    """The cheapest path of 1, 2, ... ``most`` edges, by Bellman's recursion.

    ``cost`` [levels - 1, levels] is that of the edge from i to j, infinite where j <= i.  With V_1(i)
    the cost of the edge from i to the end, V_k(i) = min over j of cost(i, j) + V_{k-1}(j).  Fewer
    paths come back where the grid has not as many edges in a row.
    """
    levels = cost.shape[1]
    value = cost[:, -1]
    follow = [torch.full((levels - 1,), levels - 1)]
    paths = [GridPath((0, levels - 1), float(value[0]))]
    for _ in range(2, min(most, levels - 1) + 1):
        value, chosen = (cost[:, :-1] + value).min(dim=1)
        follow.append(chosen)
        positions = [0]
        for step in reversed(follow):
            positions.append(int(step[positions[-1]]))
        paths.append(GridPath(tuple(positions), float(value[0])))
    return tuple(paths)
