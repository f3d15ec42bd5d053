"""Learned trajectories on a Gaussian mixture with its exact denoiser (plain torch, seconds).

12 components in 64 dimensions, sigma .25, a flow, Euler.  Everything is fitted on 16 samples and
judged on 512 others: by the mean distance of the end point to the solution of 1000 steps.

``dp.mixture.<K>``: levels by dynamic programming with the coefficients fitted to them, over the best
of ComfyUI's schedulers, each at the shift that is best for the 512 samples.  ``dp.edges.<K>``: the
same with each edge's own coefficients, as fitted on the fine path.  ``dp.plain.<K>``: these levels
at c = 1; ``dp.uncorrected.<K>``: levels that were chosen for c = 1.
``levels.mixture``: a search of levels and ramp that starts from the dynamic programming's best, by the
distance on the 16 samples; over dynamic programming's own, on the 512; ``levels.scheduler`` starts
from the evenly spaced levels instead.
``solvers.mixture``: 4 steps at evenly spaced levels and c = 1, the best mix of solvers and correctors on
the 16 samples over the single solver (with its corrector or without) that is best on the 512;
``solvers.mixture.64``: the mix that is best on 64 samples, which is less a matter of luck;
``solvers.shifted`` at shift 2, where single solvers come nearest; ``solvers.ramp`` the search over
solvers and ramp over that of Euler's ramp.  ``solvers.gp``: trials that a Gaussian process needs for
what a Parzen estimator finds in 60.
``overhead``: step time of a trajectory with three solvers over Euler's, on the demo's generator.
``demo.<steps or cfg>.<format>``: the demo's model with levels-dp, JAQ on 96 prompts that no search
saw, over the scheduler's levels at c = 1; its text has the interval, the control and the distance.
``ranking.rounds``: ZO-RankSGD's share of gp's gain, the distance being the ranker.
``dp.evaluations``: of the walk that gives all K <= 16.  ``dp.optimal``: cost over that of brute force.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from itertools import combinations, pairwise, product

import torch

from demo.build import weights_dir
from demo.mmdit import MMDiT
from demo.text import context_of, tokenize
from demo.training import load_weights
from qsched_core.search import CalibrationSettings, Search, best_of
from qsched_core.search.levels import learned_levels
from qsched_core.search.ranking import CANDIDATES
from qsched_core.search.space import SolverSpace
from qsched_core.search.trajectories import solver_menu
from qsched_core.solvers import ModelInfo, sample_steps
from qsched_core.study.journal import Journal
from qsched_core.trajectory import Candidate, StepSolver, Trajectory, best_paths

from ._common import BenchRow, machine, options, report, timings
from ._demo_levels import rows as demo_rows
from ._mixture import MixtureSource, Nearness, prompts

FITTED, MORE, JUDGED = prompts(16, 1000), prompts(64, 2000), prompts(512, 5000)
SHIFTS = [2 ** (k / 4) for k in range(-8, 13)]
STEPS = (3, 4, 6)
EVEN = Trajectory.of([1 - k / 4 for k in range(5)])
BOUNDS = {3: "<= 0.9", 4: "<= 0.75", 6: "<= 0.6"}


def row(name, what, ours, other, unit="distance", n=512, bound=""):
    return BenchRow(name, what, ours, other, ours / other, unit, n, machine(), bound)


class Judge:
    """Mean distance of candidates on the samples that nothing was fitted to."""

    def __init__(self):
        self.near = Nearness()

    def __call__(self, candidate: Candidate) -> float:
        source = MixtureSource(candidate.trajectory)
        ends = source.images(JUDGED, [candidate])[0]
        return float(self.near.distances(ends, JUDGED.seeds).mean())


def comfy_schedules(steps: int):
    """(name, shift, sigmas) of every scheduler of ComfyUI that gives so many falling steps."""
    samplers = importlib.import_module("comfy.samplers")
    module = importlib.import_module("comfy.model_sampling")
    made = type("ModelSampling", (module.ModelSamplingDiscreteFlow, module.CONST), {})()
    for shift in SHIFTS:
        made.set_parameters(shift=shift)
        for name in samplers.SCHEDULER_NAMES:
            sigmas = samplers.calculate_sigmas(made, name, steps).double().tolist()
            falls = all(a > b for a, b in pairwise(sigmas))
            if len(sigmas) == steps + 1 and falls:
                yield name, shift, tuple(sigmas)


def best_scheduler(judge: Judge, steps: int) -> tuple[float, str]:
    """The least distance of a scheduler at the shift that is best for the judged samples."""
    found = [
        (judge(Candidate.identity(Trajectory.of(sigmas))), f"{name} at shift {shift:.3g}")
        for name, shift, sigmas in comfy_schedules(steps)
    ]
    return min(found)


def programmed(steps: int):
    """What dynamic programming proposes for so many steps: see ``learned_levels``."""
    source = MixtureSource(Trajectory.of(torch.linspace(1, 0, steps + 1).tolist()))
    found = learned_levels(source, FITTED)
    return [each.candidate for each in found.proposals], found


def dp_rows(judge: Judge) -> list[BenchRow]:
    rows = []
    for steps in STEPS:
        (edges, rolled, uncorrected), _ = programmed(steps)
        other, name = best_scheduler(judge, steps)
        alone = Candidate.identity(rolled.trajectory)
        for kind, candidate, what, bound in (
            ("mixture", rolled, "levels, coefficients along the corrected path", BOUNDS[steps]),
            ("edges", edges, "levels, coefficients of each edge", ""),
            ("plain", alone, "the same levels at c = 1", ""),
            ("uncorrected", uncorrected, "levels chosen for c = 1, at c = 1", ""),
        ):
            said = f"{what}; other: {name}"
            rows.append(row(f"dp.{kind}.{steps}", said, judge(candidate), other, bound=bound))
    return rows


def evaluations() -> BenchRow:
    _, found = programmed(4)
    walked = found.grid * found.prompts
    return row(
        "dp.evaluations",
        f"the walk for all K <= 16; the coefficients along the corrected path of one K took "
        f"{found.nfe - walked} more",
        walked,
        32 * 16,
        "evaluations",
        found.prompts,
        "<= 1",
    )


def optimal() -> BenchRow:
    """The worst ratio to brute force over every grid, M = 12, K <= 5."""
    worst, count = 1.0, 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        cost = torch.rand(12, 13, generator=draw, dtype=torch.float64)
        cost.masked_fill_(torch.ones(12, 13).tril().bool(), torch.inf)
        for steps, path in enumerate(best_paths(cost, 5), start=1):
            grids = [(0, *inner, 12) for inner in combinations(range(1, 12), steps - 1)]
            brute = min(sum(float(cost[i, j]) for i, j in pairwise(grid)) for grid in grids)
            worst, count = max(worst, path.cost / brute, brute / path.cost), count + len(grids)
    return row(
        "dp.optimal",
        f"cost over brute force's ({count} grids)",
        worst,
        1.0,
        "cost",
        20,
        "<= 1.000001",
    )


def course(name: str, trials: int, seed: int) -> list[float]:
    """The values of a search's trials on the fitted samples, in turn."""
    return [trial.value for trial in search(name, trials, seed).trials]


def searched(name: str, trials: int, seed: int = 0):
    """The winner of a search on the fitted samples."""
    return best_of(search(name, trials, seed).trials)


def search(name: str, trials: int, seed: int) -> Search:
    """A finished search on the fitted samples."""
    source = MixtureSource(EVEN)
    settings = CalibrationSettings(name, trials, seed)
    levels = learned_levels(source, FITTED) if settings.learns_levels else None
    with tempfile.TemporaryDirectory() as folder, Journal(folder, "bench") as journal:
        run = Search(journal, source, Nearness(), settings, FITTED)
        run.stages(source.trajectory, levels)
    return run


def level_rows(judge: Judge) -> list[BenchRow]:
    (_, rolled, _), _ = programmed(4)
    other, rows = judge(rolled), []
    for name, strategy, bound in (
        ("levels.mixture", "levels-dp+gp", "<= 1.0"),
        ("levels.mixture.tpe", "levels-dp+tpe", ""),
        ("levels.mixture.cmaes", "levels-dp+cmaes", ""),
        ("levels.scheduler", "levels-gp", ""),
    ):
        best = searched(strategy, 60)
        said = f"{strategy}, 60 trials, best on the fitted samples {-best.value:.3f}"
        rows.append(row(name, said, judge(best.candidate), other, bound=bound))
    return rows


def mixes_of(trajectory: Trajectory) -> tuple[list[Candidate], list[Candidate]]:
    """Every mix of solvers and correctors at c = 1, and the single solvers, also corrected."""
    menu = solver_menu(trajectory)
    space = SolverSpace(trajectory, menu)
    values = {
        n: range(int(space.bounds[n][1]) + 1) if n in space.choices else (1.0,)
        for n in space.bounds
    }
    found = (
        space.candidate(dict(zip(values, map(float, point), strict=True)))
        for point in product(*values.values())
    )
    singles = [
        space.candidate(space.single(place, corrected))
        for place in range(len(menu))
        for corrected in (False, True)
    ]
    return list(dict.fromkeys(found)), list(dict.fromkeys(singles))


def named(candidate: Candidate) -> str:
    return "+".join(step.label for step in candidate.trajectory.solvers)


def best_of_solvers(judge: Judge, sigmas) -> list[tuple[int, float, float, str]]:
    """(samples, distance, the best single solver's, what they are) of the mix that is best on the
    fitted samples, and of that on four times as many."""
    trajectory, near = Trajectory.of(sigmas), Nearness()
    mixes, singles = mixes_of(trajectory)
    single = min((judge(candidate), named(candidate)) for candidate in singles)
    found = []
    for samples in (FITTED, MORE):
        source = MixtureSource(trajectory)
        fitted = [
            float(near.distances(ends, samples.seeds).mean())
            for ends in source.images(samples, mixes)
        ]
        best = mixes[min(range(len(mixes)), key=fitted.__getitem__)]
        said = f"{named(best)}, of {len(mixes)} mixes at c = 1; other: {single[1]}"
        found.append((len(samples), judge(best), single[0], said))
    return found


def solver_rows(judge: Judge) -> list[BenchRow]:
    """At evenly spaced levels, and at those where a single solver comes nearest."""
    shifted = [2 * sigma / (1 + sigma) for sigma in EVEN.sigmas]
    rows = []
    for name, sigmas in (("mixture", EVEN.sigmas), ("shifted", shifted)):
        for count, ours, other, said in best_of_solvers(judge, sigmas):
            fitted = len(FITTED) == count
            bound = "<= 0.8" if name == "mixture" and fitted else ""
            of = name if fitted else f"{name}.{count}"
            rows.append(row(f"solvers.{of}", said, ours, other, bound=bound))
    found, other = searched("solvers", 60), searched("tpe", 60)
    said = f"solvers, 60 trials: {named(found.candidate)}; other: tpe over Euler's ramp"
    rows.append(row("solvers.ramp", said, judge(found.candidate), judge(other.candidate)))
    return [*rows, solvers_by_prediction(5)]


def solvers_by_prediction(seeds: int) -> BenchRow:
    """Trials until a Gaussian process has what a Parzen estimator finds in 60."""
    counts = []
    for seed in range(seeds):
        known = max(course("solvers", 60, seed))
        reached = (k for k, value in enumerate(course("solvers-gp", 60, seed), 1) if value >= known)
        counts.append(next(reached, math.inf))
    said = f"solvers-gp, until it has what solvers has after 60: median of {', '.join(map(str, counts))}"
    return row("solvers.gp", said, statistics.median(counts), 60, "trials", seeds, "<= 0.99")


def ranking_rounds(seeds: int) -> BenchRow:
    """Rankings by the distance itself, against a Gaussian process that sees the distances."""
    start = (
        -Nearness()
        .score(MixtureSource(EVEN).images(FITTED, [Candidate.identity(EVEN)])[0], FITTED.prompts)
        .mean()
    )
    gains = {
        name: [start + searched(name, trials, seed).value for seed in range(seeds)]
        for name, trials in (("ranking", 15 * CANDIDATES), ("gp", 24))
    }
    ours, other = (statistics.median(gains[name]) for name in ("ranking", "gp"))
    shares = [a / b for a, b in zip(gains["ranking"], gains["gp"], strict=True)]
    return replace(
        row(
            "ranking.rounds",
            f"gain of the ramp on the fitted samples after 15 rounds of {CANDIDATES}, over gp's after "
            f"24 trials: median share (least {min(shares):.3f})",
            ours,
            other,
            n=seeds,
            bound=">= 0.8",
        ),
        ratio=statistics.median(shares),
    )


def overhead(runs: int) -> BenchRow:
    """A step of three solvers' trajectory, over one of Euler's, on the demo's generator."""
    model = load_weights(MMDiT(), weights_dir() / "mmdit.safetensors").eval()
    context = context_of(tokenize(["a red circle above a blue ring on a white background"] * 4))
    x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    sigmas, info = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), ModelInfo(True)

    def denoise(x, sigma):
        return x - sigma.reshape(-1, 1, 1, 1) * model(x, sigma, context)

    def sampled(*names):
        solvers = tuple(StepSolver(name) for name in names)
        steps = Trajectory(sigmas.tolist(), True, solvers).bind(info)
        return lambda: sample_steps(steps, denoise, x, sigmas)

    ours, other = timings(sampled("euler", "dpmpp_2m", "dpm_2m", "euler"), sampled("euler"), runs)
    ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
    return BenchRow(
        "overhead",
        "step time of euler, dpmpp_2m, dpm_2m, euler; other: euler alone",
        statistics.median(ours) / 4,
        statistics.median(other) / 4,
        ratio,
        "s/step",
        runs,
        machine(),
        "<= 1.02",
    )


def comfyui() -> None:
    """ComfyUI's schedulers can be imported from here on."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True


def main() -> None:
    args = options(__doc__, groups=("dp", "levels", "solvers", "ranking", "demo"))
    torch.set_num_threads(1)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    comfyui()
    rows = []
    judge = Judge()
    if "dp" in args.only:
        rows += [*dp_rows(judge), evaluations(), optimal()]
    if "levels" in args.only:
        rows += level_rows(judge)
    if "solvers" in args.only:
        rows += [*solver_rows(judge), overhead(args.runs)]
    if "ranking" in args.only:
        rows.append(ranking_rounds(10))
    if "demo" in args.only:
        rows += demo_rows()
    report(rows, args.json)


if __name__ == "__main__":
    main()
