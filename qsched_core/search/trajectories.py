"""Stages that search the trajectory itself: its noise levels, and the solver of each step."""

from __future__ import annotations

from collections.abc import Sequence

from ..solvers import get_solver
from ..study.journal import fingerprint
from ..trajectory import Candidate, StepSolver, Trajectory
from .plan import Past, Plan, Stage, StageBuilder
from .space import LevelSpace, ListSpace, SolverSpace, sobol_points

LEVEL_DESIGN = 8  # points spread over the box of levels and ramp before the sampler takes over
# What a step may have in its solver's place: order 1, and order 2 for data and for noise.
MIXED = ("euler", "dpmpp_2m", "dpm_2m", "res_multistep", "lms_2", "euler_ancestral", "lcm")
# Trials that a search over solvers begins with, at most: each alone, also with its corrector.
SINGLES = 1 + len(MIXED) + sum(get_solver(name).corrector is not None for name in MIXED)


def programmed_stage(plan: Plan, past: Sequence[Past]) -> Stage:
    """The trajectory as it is, and what dynamic programming proposes in its place."""
    proposals = () if plan.levels is None else plan.levels.proposals
    found = dict.fromkeys(
        (Candidate.identity(plan.trajectory), *(each.candidate for each in proposals))
    )
    space = ListSpace(tuple(found)[: 1 + plan.budget])
    # Trials are known by their place in the list: of another list, they are another stage's.
    content = [[each.trajectory.to_json(), each.correction.to_json()] for each in space.candidates]
    name = f"levels {fingerprint({'candidates': content})[:8]}"
    return Stage(name, space, len(space.candidates), fixed=space.points)


def _level_space(plan: Plan, centre: Candidate) -> LevelSpace:
    return LevelSpace(centre, plan.lowest, plan.low, plan.high, plan.ends)


def level_stage(sampler: str) -> StageBuilder:
    """Noise levels and ramp, from the scheduler's own levels on."""

    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        space = _level_space(plan, Candidate.identity(plan.trajectory))
        design = sobol_points(space, min(LEVEL_DESIGN, plan.budget), plan.seed)
        return Stage("levels", space, 1 + plan.budget, sampler, fixed=(space.start, *design))

    return build


def refined_stage(sampler: str) -> StageBuilder:
    """Noise levels and ramp, around the best of what dynamic programming proposed."""

    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        best = max(past, key=lambda p: p.value)
        space = _level_space(plan, best.candidate)
        trials = 1 + plan.budget - programmed_stage(plan, ()).trials
        history = ((space.start, best.value),)
        return Stage(f"{sampler} around it", space, trials, sampler, history=history)

    return build


def solver_menu(trajectory: Trajectory) -> tuple[StepSolver, ...]:
    """The trajectory's own solver, and those that a step may have in its place.

    Each evaluates the model once a step, and none was made for models of one distillation alone.
    """
    others = (StepSolver(name, get_solver(name).check({})) for name in MIXED)
    return tuple(dict.fromkeys((trajectory.solvers[0], *others)))


def solver_stage(sampler: str) -> StageBuilder:
    """Every single solver at c = 1 first, also with its corrector; then mixes and ramps."""

    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        menu = solver_menu(plan.trajectory)
        space = SolverSpace(plan.trajectory, menu, plan.low, plan.high, plan.ends)
        singles = [space.single(place) for place in range(len(menu))]
        corrected = [place for place, step in enumerate(menu) if step.solver.corrector is not None]
        singles += [space.single(place, corrected=True) for place in corrected]
        return Stage("mixes", space, 1 + plan.budget, sampler, fixed=tuple(singles))

    return build
