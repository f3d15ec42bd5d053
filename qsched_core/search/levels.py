"""Noise levels from a model's fine path: what dynamic programming over it proposes, without a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..correction import DEFAULT, Correction, correction_from_json, correction_to_json
from ..prompts import PromptSet
from ..source import Source
from ..study.errors import CalibrationError
from ..text import shown
from ..trajectory import Candidate, Fit, Observed, Trajectory, best_paths, edges, square

GRID, MOST_GRID = 32, 256
WALKED_PROMPTS = 16


@dataclass(frozen=True)
class Proposal:
    """A candidate that was computed, and in words how."""

    how: str
    candidate: Candidate


@dataclass(frozen=True)
class LearnedLevels:
    """What a walk along a fine path of ``grid`` steps found for the steps that were asked for.

    ``costs``: for 1, 2, ... steps the root of the summed squared distance of the best path's edges,
    over the norm of the walk's last latents.  ``nfe`` counts model evaluations of both models.
    """

    proposals: tuple[Proposal, ...]
    grid: int
    prompts: int
    nfe: int
    costs: tuple[float, ...]

    def describe(self) -> dict[str, Any]:
        """Plain JSON for provenance."""
        return {
            "grid": self.grid,
            "prompts": self.prompts,
            "nfe": self.nfe,
            "costs": [round(cost, 6) for cost in self.costs],
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.describe(),
            "costs": list(self.costs),
            "proposals": [
                {
                    "how": proposal.how,
                    "trajectory": proposal.candidate.trajectory.to_json(),
                    "correction": correction_to_json(proposal.candidate.correction),
                }
                for proposal in self.proposals
            ],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LearnedLevels:
        proposals = tuple(
            Proposal(
                entry["how"],
                Candidate(
                    Trajectory.from_json(entry["trajectory"]),
                    correction_from_json(entry["correction"]),
                ),
            )
            for entry in content["proposals"]
        )
        return cls(
            proposals,
            content["grid"],
            content["prompts"],
            content["nfe"],
            tuple(content["costs"]),
        )


def check_grid(grid: int, steps: int | None = None) -> int:
    """The fine path's steps for ``grid`` (0: the default); CalibrationError if it can't be."""
    if grid == 0:
        grid = max(GRID, 2 * (steps or 0))
    least = 2 if steps is None else steps + 1
    if not least <= grid <= MOST_GRID:
        need = "" if steps is None else f" for {steps} steps"
        raise CalibrationError(
            f"grid={shown(grid)} must be from {least} to {MOST_GRID}{need} (by itself it is {GRID})"
        )
    return grid


def smallest_level(source: Source) -> float:
    """The smallest noise level above 0 of the scheduler's steps, be they as given or fine."""
    inner = [*source.fine(GRID).sigmas[1:-1], *source.trajectory.sigmas[1:-1]]
    return min(inner)


def learned_levels(
    source: Source,
    prompts: PromptSet,
    grid: int = 0,
    reference: Source | None = None,
    correction: type[Correction] = DEFAULT,
    on_step: Callable[[], None] = lambda: None,
) -> LearnedLevels:
    """Proposals for the source's step count, solver and first level, from the first 16 prompts.

    The fine path is that of Euler over ``grid`` steps of the source's scheduler (0: 32), of the
    ``reference`` where there is one; edges start on it with the source's own predictions.  For
    Euler's step there are the edges' own numbers of ``correction``, and those fitted anew along the
    path that they make; for any solver the levels whose uncorrected steps stay nearest.  ``on_step()``
    is called before every model evaluation of a batch, :func:`evaluations` says how often at most.

    CalibrationError for a grid that is too coarse; ScheduleError for a correction that is not linear.
    """
    own = source.trajectory
    grid = check_grid(grid, own.steps)
    fine, few = source.fine(grid), prompts.part(0, WALKED_PROMPTS)
    before = source.nfe + (0 if reference is None else reference.nfe)
    parts = _parts(few, source.max_batch)
    walks = [_walk(source, reference, part, fine, correction, on_step) for part in parts]
    fit = walks[0].fit
    for walk in walks[1:]:
        fit = fit + walk.fit
    levels = len(fine.sigmas)
    numbers, cost = fit.solve(correction)
    plain = fit.cost(_neutral(correction))
    paths = best_paths(square(cost, levels))
    norm = sum(float(walk.latents[-1].double().square().sum()) for walk in walks)
    costs = tuple((path.cost / max(norm, 1e-300)) ** 0.5 for path in paths)
    found: list[Proposal] = []
    if _is_euler(own):
        path = best_paths(square(cost, levels), own.steps)[-1].positions
        each = square(numbers, levels)
        chosen = [each[i, j].tolist() for i, j in pairwise(path)]
        found.append(
            Proposal("levels, numbers of each edge", _at(fine, path, own, chosen, correction))
        )
        rolled = _rolled(source, walks, parts, fine, path, correction, on_step)
        found.append(
            Proposal(
                "levels, numbers along the corrected path", _at(fine, path, own, rolled, correction)
            )
        )
    path = best_paths(square(plain, levels), own.steps)[-1].positions
    found.append(Proposal("levels alone", _at(fine, path, own, None, correction)))
    unique = {proposal.candidate: proposal for proposal in reversed(found)}
    nfe = source.nfe + (0 if reference is None else reference.nfe) - before
    return LearnedLevels(tuple(reversed(unique.values())), grid, len(few), nfe, costs)


def evaluations(source: Source, prompts: int, grid: int, reference: bool) -> tuple[int, int]:
    """Latents that :func:`learned_levels` puts through the models, and in how many batches."""
    count = min(WALKED_PROMPTS, prompts)
    each = grid * (2 if reference else 1)
    each += source.trajectory.steps if _is_euler(source.trajectory) else 0
    return each * count, each * -(-count // source.max_batch)


@dataclass(frozen=True)
class _Walk:
    """A part of the prompts along the fine path: x_i [levels] on the CPU, and the fits of all edges."""

    latents: tuple[torch.Tensor, ...]
    fit: Fit


def _walk(
    source: Source,
    reference: Source | None,
    prompts: PromptSet,
    fine: Trajectory,
    correction: type[Correction],
    on_step: Callable[[], None],
) -> _Walk:
    def told(sigma: float) -> None:
        on_step()

    exact = source if reference is None else reference
    seen = exact.observed(prompts, trajectory=fine, on_evaluation=told)
    ours = seen if reference is None else source.observed(prompts, seen, fine, told)
    start, last = fine.sigmas[-2:]
    basis = correction.euler_basis(seen.latents[-1], seen.outputs[-1], start, last)
    end = (basis.double() @ _neutral(correction)).to(seen.latents[-1])
    latents = (*seen.latents, end)
    return _Walk(latents, edges(latents, ours.outputs, fine.sigmas, correction))


def _rolled(
    source: Source,
    walks: Sequence[_Walk],
    parts: Sequence[PromptSet],
    fine: Trajectory,
    path: Sequence[int],
    correction: type[Correction],
    on_step: Callable[[], None],
) -> list[list[float]]:
    """Numbers of each step, fitted where the corrected steps before it really end.

    An edge's own numbers are fitted to starts on the fine path, which no few-step run keeps to.
    """
    here = [walk.latents[path[0]] for walk in walks]
    numbers: list[list[float]] = []
    for i, j in pairwise(path):
        start, end = fine.sigmas[i], fine.sigmas[j]
        bases = []
        for part, x in zip(parts, here, strict=True):
            on_step()
            out = source.observed(part, Observed((start,), (x,), (), 0), fine).outputs[0]
            bases.append(correction.euler_basis(x, out, start, end))
        fits = [Fit.of(b, walk.latents[j]) for b, walk in zip(bases, walks, strict=True)]
        whole = fits[0]
        for fit in fits[1:]:
            whole = whole + fit
        found = whole.solve(correction)[0]
        here = [(basis.double() @ found).to(basis.dtype) for basis in bases]
        numbers.append(found.tolist())
    return numbers


def _parts(prompts: PromptSet, size: int) -> list[PromptSet]:
    return [prompts.part(start, start + size) for start in range(0, len(prompts), size)]


def _neutral(correction: type[Correction]) -> torch.Tensor:
    return torch.tensor([p.neutral for p in correction.parameters], dtype=torch.float64)


def _is_euler(trajectory: Trajectory) -> bool:
    """Whether every step is Euler's, which DDIM's without fresh noise is too."""
    return all(
        step.name == "euler" or (step.name == "ddim" and not step.options.get("eta", 0.0))
        for step in trajectory.solvers
    )


def _at(
    fine: Trajectory,
    path: Sequence[int],
    own: Trajectory,
    numbers: Sequence[Sequence[float]] | None,
    correction: type[Correction],
) -> Candidate:
    trajectory = replace(own, sigmas=tuple(fine.sigmas[i] for i in path))
    made = correction.identity(trajectory.steps)
    if numbers is not None:
        rows = zip(*numbers, strict=True)
        names = [p.name for p in correction.parameters]
        made = made.with_rows({n: tuple(row) for n, row in zip(names, rows, strict=True)})
    return Candidate(trajectory, made)
