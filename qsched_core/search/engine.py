"""The search: it suggests points, evaluates and records them, alone or beside other workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from ..objective import Scores
from ..prompts import PromptSet
from ..source import Measure, OnPictures, Source, scored
from ..study.errors import CalibrationError
from ..study.store import Point, Record, Store
from ..trajectory import Candidate, Trajectory
from .course import SEARCH, Course, Standing
from .levels import LearnedLevels, smallest_level
from .plan import Past, Stage
from .pruners import Judge, get_pruner, rungs
from .samplers import suggest
from .settings import CalibrationSettings
from .space import NOTHING, on_edge
from .strategies import get_strategy

POLL_SECONDS = 1.0
RECENT = 8


@dataclass(frozen=True)
class Trial:
    """A finished candidate: its number in the whole search (0 is c = 1), scores, and cost.

    ``value`` is the mean JAQ on the calibration prompts.  A ``pruned`` trial saw only the first of
    them: its value is the mean of c = 1 plus the mean gain on those.  ``seconds`` and ``nfe`` (model
    evaluations) are its share of the batch that it was evaluated in.
    """

    number: int
    stage: str
    candidate: Candidate
    scores: Scores
    value: float
    seconds: float
    nfe: int
    edges: tuple[str, ...] = ()  # coordinates at the end of their searched range
    pruned: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "stage": self.stage,
            "sigmas": list(self.candidate.trajectory.sigmas),
            "solvers": [step.label for step in self.candidate.trajectory.solvers],
            **self.candidate.correction.to_json(),
            "jaq": self.value,
            "means": self.scores.means(),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "pruned": self.pruned,
        }


@dataclass(frozen=True)
class Progress:
    """Handed to ``on_trial`` after each trial; ``resumed`` ones were not evaluated here.

    ``total`` counts all trials of the search, ``seconds_left`` estimates those to come.
    """

    trial: Trial
    total: int
    best: Trial
    improved: bool
    seconds_left: float
    resumed: bool


@dataclass(frozen=True)
class Monitor:
    """What a calibration tells while it runs; each call may raise to stop it.

    ``on_trial`` follows each trial, ``on_standing`` each sampling step of every part,
    ``on_pictures(source, candidate, prompts, images)`` gets all pictures as they are scored, and ``idle`` is
    called while other workers have the remaining trials.
    """

    on_trial: Callable[[Progress], None] | None = None
    on_standing: Callable[[Standing], None] | None = None
    on_pictures: OnPictures | None = None
    idle: Callable[[], None] = lambda: None


def best_of(trials: Sequence[Trial]) -> Trial:
    """The highest JAQ; the earlier one of equals, so that c = 1 wins a tie.

    Pruned trials count only while there is no other: where what was damaged is still to be made again.
    """
    whole = [trial for trial in trials if not trial.pruned] or trials
    return max(whole, key=lambda t: (t.value, -t.number))


class Search:
    """One worker's run of one study: candidates from ``source``, scored by ``measure``."""

    def __init__(
        self,
        store: Store,
        source: Source,
        measure: Measure,
        settings: CalibrationSettings,
        prompts: PromptSet,
        monitor: Monitor | None = None,
    ):
        self.store, self.source, self.measure = store, source, measure
        self.settings, self.prompts, self.monitor = settings, prompts, monitor or Monitor()
        self.pruner = get_pruner(settings.pruner)
        self.trials: list[Trial] = []
        # The scores of c = 1, which is slot 0 of the first stage.  It need not be the first of the
        # trials: those are in the order of arrival, and another worker's may come earlier.
        self.base: Scores | None = None
        self.new_trials = 0
        self.total = 1 + settings.budget
        self.course = Course(source.trajectory.steps, self.monitor.on_standing)
        self.course.trials = self.total
        self.course.expect(SEARCH, self.total * len(prompts))

    def stages(self, trajectory: Trajectory, levels: LearnedLevels | None = None) -> None:
        """Run every stage of the strategy; ``levels`` for one that asks for them."""
        self.course.begin(SEARCH)
        lowest = smallest_level(self.source) if self.settings.searches_levels else 0.0
        plan = self.settings.plan(trajectory, levels, lowest)
        strategy = get_strategy(self.settings.strategy)
        for build in strategy.stages(plan):
            finished = [t for t in self.trials if not t.pruned]
            stage = build(plan, [Past(t.candidate, t.value) for t in finished])
            if stage.trials > self.total - len(self.trials):
                self.total = len(self.trials) + stage.trials
            self._run(stage)

    def _run(self, stage: Stage) -> None:
        started, seen, own = len(self.trials), set(), set()
        while True:
            done = self.store.records(stage.name)
            for slot in [slot for slot in done if slot not in seen]:
                seen.add(slot)
                if started == slot == 0:
                    self.base = done[slot].scores
                self._note(stage, done[slot], resumed=slot not in own)
            if len(done) >= stage.trials:
                break
            working = self.store.working(stage.name)
            free = [s for s in range(stage.trials) if s not in done and s not in working]
            if not free:
                self._wait()
                continue
            points = self._next(stage, done, working, free)
            with self.store.claim(stage.name, stage.space, points) as claim:
                if not claim.points:
                    self._wait()
                    continue
                for record in self._evaluated(stage, claim.points, done):
                    claim.finish(record)
                    own.add(record.slot)
                    self.new_trials += 1
        # other workers' trials arrive out of order
        ordered = [self._trial(stage, done[slot], started + slot) for slot in sorted(done)]
        self.trials[started:] = ordered

    def _wait(self) -> None:
        self.monitor.idle()
        time.sleep(POLL_SECONDS)

    def _next(
        self,
        stage: Stage,
        done: Mapping[int, Record],
        working: Mapping[int, Point],
        free: Sequence[int],
    ) -> dict[int, Point]:
        """Points for the free slots that are evaluated together next."""
        fixed = stage.fixed[: stage.trials]
        if free[0] < len(fixed):
            return {s: fixed[s] for s in free[: self.settings.together] if s < len(fixed)}
        # What was lost, by damage or a dead worker, is proposed as it was: from what was before it.
        known = [r for r in done.values() if r.slot < free[0]]
        past = [*stage.history, *((r.point, self._value(r)) for r in known)]
        # Running trials count as bad ones, so that workers look in different places.
        worst = min((value for _, value in past), default=0.0)
        past += [(point, worst) for point in working.values()]
        points: dict[int, Point] = {}
        for slot in free[: self.settings.proposals]:
            points[slot] = suggest(
                stage.sampler, stage.space, past, self.settings.seed, stage.name, slot
            )
            past.append((points[slot], worst))
        return points

    def _evaluated(self, stage: Stage, points: Mapping[int, Point], done: Mapping[int, Record]):
        if self.pruner.name == "full" or self.base is None:
            candidates = [stage.space.candidate(point) for point in points.values()]
            measured = self._measure(candidates, self.prompts)
            for (slot, point), cost in zip(points.items(), measured, strict=True):
                yield Record(slot, point, *cost)
            return
        finished = [t.scores.jaq for t in self.trials]
        for slot, point in points.items():
            record = self._in_rungs(stage, slot, point, finished)
            finished.append(record.scores.jaq)
            yield record

    def _in_rungs(self, stage: Stage, slot: int, point: Point, finished) -> Record:
        judge = Judge(self.pruner, len(self.prompts), finished)
        parts, start, pruned = [], 0, False
        for stop in rungs(len(self.prompts)):
            part = self.prompts.part(start, stop)
            parts += self._measure([stage.space.candidate(point)], part)
            start = stop
            if judge.give_up(Scores.join([scores for scores, _, _ in parts]).jaq):
                pruned = True
                break
        scores, seconds, nfe = zip(*parts, strict=True)
        return Record(slot, point, Scores.join(scores), sum(seconds), sum(nfe), pruned)

    def _value(self, record: Record) -> float:
        if not record.pruned or self.base is None:
            return record.scores.mean()
        base = self.base.jaq
        return record.scores.mean() + fmean(base) - fmean(base[: len(record.scores)])

    def _trial(self, stage: Stage, record: Record, number: int) -> Trial:
        return Trial(
            number,
            stage.name,
            stage.space.candidate(record.point),
            record.scores,
            self._value(record),
            record.seconds,
            record.nfe,
            tuple(on_edge(stage.space, record.point)),
            record.pruned,
        )

    def _note(self, stage: Stage, record: Record, resumed: bool) -> None:
        trial = self._trial(stage, record, len(self.trials))
        self.trials.append(trial)
        best = best_of(self.trials)
        self.course.trial(
            best.value, trial.seconds, len(trial.scores), self.total, len(self.prompts)
        )
        if self.monitor.on_trial is not None:
            recent = self.trials[-RECENT:]
            left = fmean(t.seconds for t in recent) * (self.total - len(self.trials))
            self.monitor.on_trial(Progress(trial, self.total, best, best is trial, left, resumed))

    def noted(self, key: str, make: Callable[[], Any]) -> Any:
        """Plain JSON under ``key`` of the study: made by one worker, read by all others."""
        while True:
            found = self.store.get(key)
            if found is not None:
                return found
            if not self.store.working(key):
                with self.store.claim(key, NOTHING, {0: {}}) as claim:
                    if claim.points and self.store.get(key) is None:
                        self.store.put(key, make())
                continue
            self._wait()

    def judged(
        self,
        name: str,
        candidates: Sequence[Candidate],
        prompts: PromptSet,
        source: Source | None = None,
    ) -> list[Record]:
        """Evaluate on other prompts, or from another source; the results are kept in the study too.

        They are kept under ``name`` and the prompts: the same call evaluates nothing again.
        """
        stage = f"{name} {prompts.hash[:24]}"
        while True:
            done = self.store.records(stage)
            missing = [slot for slot in range(len(candidates)) if slot not in done]
            if not missing:
                return list(done.values())
            if any(slot in self.store.working(stage) for slot in missing):
                self._wait()
                continue
            with self.store.claim(stage, NOTHING, {slot: {} for slot in missing}) as claim:
                if not claim.points:
                    self._wait()
                    continue
                mine = [candidates[slot] for slot in claim.points]
                measured = self._measure(mine, prompts, source)
                for slot, cost in zip(claim.points, measured, strict=True):
                    claim.finish(Record(slot, {}, *cost))

    def _measure(
        self, candidates: Sequence[Candidate], prompts: PromptSet, source: Source | None = None
    ) -> list[tuple[Scores, float, int]]:
        """Scores, seconds and NFE of every candidate."""
        source = source or self.source
        started, counted = time.perf_counter(), source.nfe
        pictures = len(candidates) * len(prompts)
        self.course.measuring(pictures, -(-pictures // source.max_batch))
        try:
            scores = scored(
                source,
                self.measure,
                candidates,
                prompts,
                self.course.step,
                self.monitor.on_pictures,
            )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            number = len(self.trials) + 1
            what = f"trial {number} of {self.total}" if number <= self.total else "the judgement"
            raise CalibrationError(
                f"{what} failed: {error}. The {number - 1} trials before it are kept; mend the "
                "cause and run the same again to go on from there"
            ) from error
        self.course.scored()
        seconds = (time.perf_counter() - started) / len(candidates)
        share, rest = divmod(source.nfe - counted, len(candidates))
        if any(len(s) != len(prompts) for s in scores):
            raise CalibrationError(
                f"the objective gave scores for {[len(s) for s in scores]} images; "
                f"{len(candidates)} candidates of {len(prompts)} prompts each were asked for"
            )
        return [(s, seconds, share + (i < rest)) for i, s in enumerate(scores)]
