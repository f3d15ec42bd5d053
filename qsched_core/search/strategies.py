"""How the coefficients are searched: a strategy is a sequence of stages.

A stage has points that are fixed in advance and, after them, points that a sampler proposes from
the finished trials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..optional import missing
from ..study.errors import CalibrationError
from ..text import shown
from ..trajectory import Candidate
from .plan import Past, Plan, Stage, StageBuilder
from .ranking import CANDIDATES, ranking_stages
from .samplers import SAMPLERS
from .space import StepSpace, grid_points, sobol_points
from .trajectories import SINGLES, level_stage, programmed_stage, refined_stage, solver_stage

RAMP_DESIGN = 4  # points spread over the ramp's box before the sampler takes over
RAMP_SHARE = 24 / 64  # the ramp's share of the budget, where single steps are refined after it
PAPER, WIDE = (0.8, 1.2), (0.6, 1.6)  # boxes of the ramp; the demo's best lies outside the paper's


@dataclass(frozen=True)
class Strategy:
    """A registry entry; budgets count trials beside the first one, which is at c = 1.

    ``ramp`` says whether ramps are searched, ``box`` in which range by default.
    ``min_budget_ends`` is the least budget if the ramps' ends are free; 0: no more than otherwise.
    ``levels`` says that the plan must have what dynamic programming found: see :mod:`.levels`;
    ``searches_levels`` that it must know the smallest noise level.  ``whole``: no candidate may be
    given up early.
    """

    name: str
    summary: str
    default_budget: int
    min_budget: int
    stages: Callable[[Plan], Sequence[StageBuilder]]
    sampler: str = ""
    box: tuple[float, float] = WIDE
    ramp: bool = True
    min_budget_ends: int = 0
    levels: bool = False
    searches_levels: bool = False
    whole: bool = False

    def available(self) -> str | None:
        """Why this strategy can't run here, with the fix, or None."""
        if self.sampler:
            return SAMPLERS[self.sampler].available()
        return missing("optuna", f"search {self.name!r}", "optuna")

    def budget(self, asked: int, ends: bool = False) -> int:
        """Trials beside c = 1 for ``asked`` (0: the default); CalibrationError if too few."""
        if asked == 0:
            return self.default_budget
        least = max(self.min_budget, self.min_budget_ends if ends else 0)
        if asked < least:
            free = " with the ramps' ends free" if ends else ""
            raise CalibrationError(
                f"budget={shown(asked)} is too small for search {self.name!r}{free}; give at least "
                f"{least} (by itself it takes {self.default_budget})"
            )
        return asked


def _grid_stage(plan: Plan, past: Sequence[Past]) -> Stage:
    space = plan.ramp()
    points = grid_points(space, _side(plan.budget, len(space.bounds)))
    points = [p for p in points if any(abs(value - 1) > 1e-9 for value in p.values())]
    fixed = (space.start, *points)
    return Stage("grid", space, len(fixed), fixed=fixed)


def _side(points: int, dimensions: int) -> int:
    """The largest side of a grid of at most ``points``."""
    side = round(points ** (1 / dimensions))
    return side if side**dimensions <= points else side - 1


def _ramp_trials(plan: Plan) -> int:
    return max(1, round(plan.budget * RAMP_SHARE))


def _ramp_stage(sampler: str, trials: Callable[[Plan], int]) -> StageBuilder:
    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        space, count = plan.ramp(), trials(plan)
        design = sobol_points(space, min(RAMP_DESIGN, count), plan.seed)
        return Stage("ramp", space, 1 + count, sampler, fixed=(space.start, *design))

    return build


def _joint_stage(sampler: str) -> StageBuilder:
    """Every step's coefficients at once, around 1."""

    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        space = StepSpace(Candidate.identity(plan.trajectory), plan.radius)
        return Stage("steps", space, 1 + plan.budget, sampler, fixed=(space.start,))

    return build


def _block_stages(sampler: str, plan: Plan) -> list[StageBuilder]:
    """One step after another, from the first on, each around the best candidate so far.

    A change at step i costs only the evaluations after it; at the last step it costs none.  Cheap
    steps get more of the trials.
    """
    left = plan.budget - _ramp_trials(plan)
    weights = [1 / (plan.steps - i) for i in range(plan.steps)]
    ends = [round(left * sum(weights[: i + 1]) / sum(weights)) for i in range(plan.steps)]

    def stage(i: int) -> StageBuilder:
        def build(plan: Plan, past: Sequence[Past]) -> Stage:
            best = max(past, key=lambda p: p.value)
            space = StepSpace(best.candidate, plan.radius, (i,))
            trials = ends[i] - (ends[i - 1] if i else 0)
            history = ((space.start, best.value),)
            return Stage(f"step {i + 1}", space, trials, sampler, history=history)

        return build

    return [stage(i) for i in range(plan.steps)]


def _grid() -> Strategy:
    return Strategy(
        "grid",
        "the paper's grid of the ramp's start values (the budget's root a side)",
        100,
        4,
        lambda plan: (_grid_stage,),
        box=PAPER,
        min_budget_ends=2**4,  # two values in each of four dimensions
    )


def _levels_dp() -> Strategy:
    return Strategy(
        "levels-dp",
        "noise levels by dynamic programming, with and without coefficients fitted to them; the "
        "prompts judge only what it proposes",
        3,
        1,
        lambda plan: (programmed_stage,),
        ramp=False,
        levels=True,
    )


def _levels(sampler: str) -> Strategy:
    return Strategy(
        f"levels-{sampler}",
        f"{SAMPLERS[sampler].summary}, over noise levels and ramp, from the scheduler's levels on",
        60,
        1,
        lambda plan: (level_stage(sampler),),
        sampler,
        searches_levels=True,
    )


def _levels_dp_and(sampler: str) -> Strategy:
    return Strategy(
        f"levels-dp+{sampler}",
        f"levels-dp, then {SAMPLERS[sampler].summary} over noise levels and ramp around its best",
        60,
        4,
        lambda plan: (programmed_stage, refined_stage(sampler)),
        sampler,
        levels=True,
        searches_levels=True,
    )


def _solvers(sampler: str, name: str) -> Strategy:
    return Strategy(
        name,
        f"{SAMPLERS[sampler].summary}, over a solver for each step and the ramp",
        60,
        SINGLES,
        lambda plan: (solver_stage(sampler),),
        sampler,
    )


def _ranking() -> Strategy:
    return Strategy(
        "ranking",
        "rounds of 6 candidates of the ramp that are only ranked (ZO-RankSGD), as Rank Candidates "
        "does by a person's eye",
        15 * CANDIDATES,
        2 * CANDIDATES,
        ranking_stages,
        whole=True,
    )


def _ramp(sampler: str) -> Strategy:
    return Strategy(
        sampler,
        f"{SAMPLERS[sampler].summary}, over the ramp",
        24,
        1,
        lambda plan: (_ramp_stage(sampler, lambda plan: plan.budget),),
        sampler,
    )


def _ramp_and_steps(sampler: str) -> Strategy:
    return Strategy(
        f"{sampler}+steps",
        f"{SAMPLERS[sampler].summary}, over the ramp and then one step after another",
        64,
        4,
        lambda plan: (_ramp_stage(sampler, _ramp_trials), *_block_stages(sampler, plan)),
        sampler,
    )


def _steps(sampler: str) -> Strategy:
    return Strategy(
        f"steps-{sampler}",
        f"{SAMPLERS[sampler].summary}, over every step's coefficients from 1 on",
        40,
        1,
        lambda plan: (_joint_stage(sampler),),
        sampler,
        ramp=False,
    )


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        *(_ramp(name) for name in SAMPLERS),
        *(_ramp_and_steps(name) for name in SAMPLERS),
        *(_steps(name) for name in SAMPLERS),
        _grid(),
        _levels_dp(),
        *(_levels(name) for name in SAMPLERS),
        *(_levels_dp_and(name) for name in SAMPLERS),
        _solvers("tpe", "solvers"),
        _solvers("gp", "solvers-gp"),
        _ranking(),
    )
}


def get_strategy(name: str) -> Strategy:
    """CalibrationError, naming the known ones, for an unknown strategy."""
    if name not in STRATEGIES:
        raise CalibrationError(
            f"search={shown(name)} is unknown; choose one of {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[name]
