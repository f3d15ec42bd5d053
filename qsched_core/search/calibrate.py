"""The calibration: search on some prompts, judge on others, keep everything on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..objective import Scores
from ..optional import MissingDependencyError, require
from ..precondition import ScalarCorrection
from ..prompts import CalibrationPrompts, PromptSet
from ..schedule import QSchedule
from .errors import CalibrationError
from .guard import Interval, Verdict, judge, paired_interval
from .journal import Journal, Record, distributions, fingerprint, finished_trial
from .space import Point, check_radius, check_range, on_edge
from .strategies import Past, Plan, Stage, get_strategy, gp_sampler

logger = logging.getLogger(__name__)

SEARCH_VERSION = 1  # part of every study's name: raise it when proposals change
FEW_PROMPTS = 10


class Evaluate(Protocol):
    """Makes the images of every prompt under every correction and scores them."""

    def __call__(
        self, corrections: Sequence[ScalarCorrection], prompts: PromptSet
    ) -> Sequence[Scores]: ...


@dataclass(frozen=True)
class CalibrationSettings:
    """How to search.

    ``budget`` counts candidates beside c = 1; 0 is the strategy's default.  ``low`` and ``high``
    bound the ramp's start values, ``radius`` the per-step refinement around the best ramp.
    ``together`` candidates that don't depend on results are evaluated at a time.  Raises
    CalibrationError on any invalid field, MissingDependencyError if the strategy needs a package.
    """

    strategy: str = "gp+steps"
    budget: int = 0
    seed: int = 0
    guard: bool = True
    low: float = 0.8
    high: float = 1.2
    radius: float = 0.1
    together: int = 4

    def __post_init__(self):
        strategy = get_strategy(self.strategy)
        object.__setattr__(self, "budget", strategy.budget(self.budget))
        if self.seed < 0:
            raise CalibrationError(f"seed={self.seed} may not be negative")
        if self.together < 1:
            raise CalibrationError(f"together={self.together} must be at least 1")
        check_range(self.low, self.high)
        check_radius(self.radius)
        reason = strategy.available()
        if reason:
            raise MissingDependencyError(reason)

    def plan(self, steps: int) -> Plan:
        return Plan(steps, self.budget, self.seed, self.low, self.high, self.radius)


@dataclass(frozen=True)
class Trial:
    """A finished candidate: its number in the whole search (0 is c = 1), scores, and cost.

    ``seconds`` and ``model_evaluations`` are its share of what it was evaluated together with.
    """

    number: int
    stage: str
    correction: ScalarCorrection
    scores: Scores
    seconds: float
    model_evaluations: int
    edges: tuple[str, ...] = ()  # coordinates at the end of their searched range

    @property
    def value(self) -> float:
        """Mean JAQ of the calibration prompts."""
        return self.scores.mean()

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "stage": self.stage,
            "c_x": list(self.correction.c_x),
            "c_eps": list(self.correction.c_eps),
            "jaq": self.value,
            "means": self.scores.means(),
            "seconds": self.seconds,
            "model_evaluations": self.model_evaluations,
        }


@dataclass(frozen=True)
class Progress:
    """Handed to ``on_trial`` after each trial; ``resumed`` ones were read from the journal.

    ``total`` counts all trials of the search, ``seconds_left`` estimates those to come.
    """

    trial: Trial
    total: int
    best: Trial
    improved: bool
    seconds_left: float
    resumed: bool


@dataclass(frozen=True)
class CalibrationResult:
    """``schedule`` is what the guard lets through, ``best`` the search's own winner.

    The intervals are of the winner's gain over c = 1, and None where nothing beat c = 1.
    ``new_trials`` were evaluated in this call, the others came from the journal.
    """

    schedule: QSchedule
    best: ScalarCorrection
    verdict: Verdict
    trials: tuple[Trial, ...]
    calibration: Interval | None
    heldout: Interval | None
    heldout_before: Scores
    heldout_after: Scores
    warnings: tuple[str, ...]
    model_evaluations: int
    seconds: float
    journal: Path
    new_trials: int

    @property
    def baseline(self) -> Trial:
        return self.trials[0]

    @property
    def winner(self) -> Trial:
        return best_of(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "verdict": self.verdict.kind,
            "text": self.verdict.text,
            "guarded": self.verdict.keep_identity,
            "schedule": self.schedule.to_json(),
            "best": {"c_x": list(self.best.c_x), "c_eps": list(self.best.c_eps)},
            "calibration": {
                "before": self.baseline.scores.means(),
                "after": self.winner.scores.means(),
                "gain": _plain(self.calibration),
                "scores_before": self.baseline.scores.to_dict(),
                "scores_after": self.winner.scores.to_dict(),
            },
            "heldout": {
                "before": self.heldout_before.means(),
                "after": self.heldout_after.means(),
                "gain": _plain(self.heldout),
                "scores_before": self.heldout_before.to_dict(),
                "scores_after": self.heldout_after.to_dict(),
            },
            "warnings": list(self.warnings),
            "model_evaluations": self.model_evaluations,
            "seconds": self.seconds,
            "new_trials": self.new_trials,
            "trials": [trial.to_dict() for trial in self.trials],
            "journal": str(self.journal),
        }


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.to_dict()


def best_of(trials: Sequence[Trial]) -> Trial:
    """The highest JAQ; the earlier one of equals, so that c = 1 wins a tie."""
    return max(trials, key=lambda t: (t.value, -t.number))


def calibrate(
    evaluate: Evaluate,
    sigmas: Sequence[float],
    flow: bool,
    solver: str,
    settings: CalibrationSettings,
    prompts: CalibrationPrompts,
    provenance: Mapping[str, Any],
    folder: str | Path,
    on_trial: Callable[[Progress], None] | None = None,
    count_evaluations: Callable[[], int] = lambda: 0,
) -> CalibrationResult:
    """Learn coefficients for the trajectory ``sigmas`` [steps + 1] of ``solver``.

    The search maximises the mean JAQ of the calibration prompts; only c = 1 and its winner are
    then evaluated on the held-out ones.  ``provenance`` (plain JSON: model, objective, size, cfg)
    names the study, whose journal lies in ``folder``: the same call continues a run that was
    killed, to the same result, and a finished one evaluates nothing.  ``count_evaluations`` says
    how many latents went through the model so far.

    Raises CalibrationError before the search if ``folder`` can't be used or the held-out prompts
    are too few for an interval, and during it if ``evaluate`` gives too few scores; ScheduleError
    for a trajectory that no schedule can have.  What ``evaluate`` raises passes through, and the
    journal keeps what is finished.
    """
    identity = QSchedule.identity(sigmas, solver, flow)
    for name, members in (("calibration", prompts.calibration), ("held-out", prompts.heldout)):
        if len(members) < 2:
            raise CalibrationError(f"one {name} prompt gives no interval; give at least 2")
    search = {k: v for k, v in asdict(settings).items() if k not in ("guard", "together")}
    content = {
        "version": SEARCH_VERSION,
        "sigmas": list(identity.sigmas),
        "flow": flow,
        "solver": solver,
        "search": search,
        "calibration": prompts.calibration.hash,
        "provenance": dict(provenance),
    }
    with Journal(folder, fingerprint(content)) as journal:
        run = _Search(journal, evaluate, settings, prompts.calibration, on_trial, count_evaluations)
        run.stages(identity.steps)
        winner = best_of(run.trials)
        candidates = list(dict.fromkeys((identity.correction(), winner.correction)))
        heldout = run.once(candidates, prompts.heldout)
    trials = tuple(run.trials)
    before, after = heldout[0].scores, heldout[-1].scores
    gains = [None, None]
    if winner is not trials[0]:
        gains = [
            paired_interval(trials[0].scores.jaq, winner.scores.jaq, settings.seed),
            paired_interval(before.jaq, after.jaq, settings.seed),
        ]
    verdict = judge(*gains, settings.guard)
    costs = [*trials, *heldout]
    seconds = sum(cost.seconds for cost in costs)
    evaluations = sum(cost.model_evaluations for cost in costs)
    facts = {
        "source": "calibration",
        **provenance,
        "search": {**search, "trials": len(trials)},
        "prompts": {
            part: {"count": len(members), "hash": members.hash, "seeds": list(members.seeds)}
            for part, members in (
                ("calibration", prompts.calibration),
                ("heldout", prompts.heldout),
            )
        },
        "scores": {
            "calibration": [trials[0].scores.means(), winner.scores.means()],
            "heldout": [before.means(), after.means()],
            "calibration_gain": _plain(gains[0]),
            "heldout_gain": _plain(gains[1]),
        },
        "verdict": verdict.kind,
        "guarded": verdict.keep_identity,
        "best": asdict(winner.correction),
        "model_evaluations": evaluations,
        "seconds": round(seconds, 1),
    }
    chosen = identity.correction() if verdict.keep_identity else winner.correction
    warnings = tuple(_warnings(trials, prompts))
    for warning in warnings:
        logger.warning(warning)
    return CalibrationResult(
        schedule=QSchedule(identity.sigmas, chosen.c_x, chosen.c_eps, solver, flow, facts),
        best=winner.correction,
        verdict=verdict,
        trials=trials,
        calibration=gains[0],
        heldout=gains[1],
        heldout_before=before,
        heldout_after=after,
        warnings=warnings,
        model_evaluations=evaluations,
        seconds=seconds,
        journal=journal.path,
        new_trials=run.new_trials,
    )


class _Search:
    """One run of one study: proposes, evaluates, records."""

    def __init__(self, journal, evaluate, settings, prompts, on_trial, count_evaluations):
        self.journal, self.evaluate, self.settings = journal, evaluate, settings
        self.prompts, self.on_trial, self.count = prompts, on_trial, count_evaluations
        self.trials: list[Trial] = []
        self.new_trials = 0
        self.total = 1 + settings.budget

    def stages(self, steps: int) -> None:
        """Run every stage of the strategy."""
        plan = self.settings.plan(steps)
        strategy = get_strategy(self.settings.strategy)
        for build in strategy.stages:
            stage = build(plan, [Past(t.correction, t.value) for t in self.trials])
            if len(strategy.stages) == 1:
                self.total = stage.trials
            self._run(stage)

    def _run(self, stage: Stage) -> None:
        done = self.journal.records(stage.name)
        for record in done:
            self._note(stage, record, resumed=True)
        for points in self._proposals(stage, done):
            corrections = [stage.space.correction(point) for point in points]
            measured = self._measure(corrections, self.prompts)
            for point, (scores, seconds, evaluations) in zip(points, measured, strict=True):
                record = Record(point, scores, seconds, evaluations)
                self.journal.append(stage.name, stage.space, record)
                done.append(record)
                self.new_trials += 1
                self._note(stage, record, resumed=False)

    def _proposals(self, stage: Stage, done: list[Record]) -> Iterator[list[Point]]:
        """Points yet to be tried, a batch at a time; ``done`` grows between batches."""
        fixed = stage.fixed[: stage.trials]
        while len(done) < len(fixed):
            yield list(fixed[len(done) : len(done) + self.settings.together])
        if len(done) >= stage.trials:
            return
        # Asked of a copy in memory: the journal has finished trials only.
        study = require("optuna", "the search", "optuna").create_study(direction="maximize")
        past = [*stage.history, *((record.point, record.scores.mean()) for record in done)]
        study.add_trials([finished_trial(stage.space, *point) for point in past])
        while len(done) < stage.trials:
            study.sampler = gp_sampler(self.settings.seed, stage.name, len(done))
            # ComfyUI runs nodes in inference mode; fitting the Gaussian process needs gradients.
            with torch.inference_mode(False), torch.enable_grad():
                trial = study.ask(distributions(stage.space))
            yield [trial.params]
            study.tell(trial, done[-1].scores.mean())

    def _note(self, stage: Stage, record: Record, resumed: bool) -> None:
        trial = Trial(
            len(self.trials),
            stage.name,
            stage.space.correction(record.point),
            record.scores,
            record.seconds,
            record.model_evaluations,
            tuple(on_edge(stage.space, record.point)),
        )
        self.trials.append(trial)
        if self.on_trial is not None:
            best = best_of(self.trials)
            recent = self.trials[-8:]
            pace = sum(t.seconds for t in recent) / len(recent)
            left = pace * (self.total - len(self.trials))
            self.on_trial(Progress(trial, self.total, best, best is trial, left, resumed))

    def once(self, corrections: Sequence[ScalarCorrection], prompts: PromptSet) -> list[Record]:
        """Evaluate on other prompts than the search's; recorded, so that it is done once."""
        key = f"heldout {prompts.hash}"
        content = self.journal.get(key)
        if content is None:
            content = [
                [scores.to_dict(), seconds, evaluations]
                for scores, seconds, evaluations in self._measure(corrections, prompts)
            ]
            self.journal.put(key, content)
        return [
            Record({}, Scores.from_dict(scores), seconds, evaluations)
            for scores, seconds, evaluations in content
        ]

    def _measure(
        self, corrections: Sequence[ScalarCorrection], prompts: PromptSet
    ) -> list[tuple[Scores, float, int]]:
        started, counted = time.perf_counter(), self.count()
        scores = list(self.evaluate(corrections, prompts))
        seconds = (time.perf_counter() - started) / len(corrections)
        share, rest = divmod(self.count() - counted, len(corrections))
        if len(scores) != len(corrections) or any(len(s) != len(prompts) for s in scores):
            raise CalibrationError(
                f"evaluate gave scores for {[len(s) for s in scores]} images; "
                f"{len(corrections)} candidates of {len(prompts)} prompts each were asked for"
            )
        return [(s, seconds, share + (i < rest)) for i, s in enumerate(scores)]


def _warnings(trials: Sequence[Trial], prompts: CalibrationPrompts) -> Iterator[str]:
    first, winner = trials[0], best_of(trials)
    if len(trials) > 1 and len({trial.scores.jaq for trial in trials}) == 1:
        yield (
            "every candidate scored the same: the objective does not see the coefficients; "
            "try another scorer"
        )
    if winner is not first and winner.edges:
        yield (
            f"the best candidate lies on the edge of the search ({', '.join(winner.edges)}); "
            "a wider range may hold a better one"
        )
    before, after = first.scores.means(), winner.scores.means()
    if after["alignment"] < before["alignment"]:
        yield (
            f"JAQ rose by {after['jaq'] - before['jaq']:.4f} while alignment fell by "
            f"{before['alignment'] - after['alignment']:.4f}: look whether the images still show "
            "their prompts"
        )
    for name, members in (("calibration", prompts.calibration), ("held-out", prompts.heldout)):
        if len(members) < FEW_PROMPTS:
            yield f"{len(members)} {name} prompts are few; about 20 are usual"
