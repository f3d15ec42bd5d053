"""The calibration: search on some prompts, judge on others, keep everything on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..objective import Scores
from ..prompts import CalibrationPrompts, PromptSet
from ..schedule import QSchedule
from ..search.course import CONTROL, HELDOUT, LEVELS, PRECHECK
from ..search.engine import Monitor, Search, Trial, best_of
from ..search.levels import LearnedLevels, check_grid, evaluations, learned_levels
from ..search.settings import CalibrationSettings
from ..source import Measure, Source, check_reference
from ..statistics import Interval, paired_interval
from ..study import CalibrationError, StudyPlace, fingerprint
from ..study.store import Store
from ..trajectory import Candidate
from .cautions import cautions
from .control import Control
from .guard import Verdict, judge
from .precheck import PreCheck, compared

logger = logging.getLogger(__name__)

SEARCH_VERSION = 2  # part of every study's name: raise it when other points are proposed


@dataclass(frozen=True)
class CalibrationResult:
    """``schedule`` is what the guard lets through, ``best`` the candidate that won the search.

    The intervals are those of the winner's gain over c = 1; None if nothing beat c = 1.
    ``new_trials`` were evaluated in this call; the others were read from ``where`` the study is
    kept.  ``journal`` is the study's file; of a study in a database, the path that it would have.
    """

    schedule: QSchedule
    best: Candidate
    verdict: Verdict
    trials: tuple[Trial, ...]
    calibration: Interval | None
    heldout: Interval | None
    heldout_before: Scores
    heldout_after: Scores
    warnings: tuple[str, ...]
    nfe: int
    seconds: float
    journal: Path
    where: str
    new_trials: int
    control: Control | None = None
    precheck: PreCheck | None = None

    @property
    def baseline(self) -> Trial:
        return self.trials[0]

    @property
    def winner(self) -> Trial:
        return best_of(self.trials)

    @property
    def learned_trajectory(self) -> bool:
        """Whether the best candidate has noise levels or solvers of its own."""
        return self.best.trajectory != self.baseline.candidate.trajectory

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "verdict": self.verdict.kind,
            "text": self.verdict.text,
            "guarded": self.verdict.keep_identity,
            "schedule": self.schedule.to_json(),
            "best": self.best.correction.to_json(),
            "best_trajectory": self.best.trajectory.to_json(),
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
            "control": None if self.control is None else self.control.to_dict(),
            "precheck": None if self.precheck is None else self.precheck.to_dict(),
            "warnings": list(self.warnings),
            "nfe": self.nfe,
            "seconds": self.seconds,
            "new_trials": self.new_trials,
            "trials": [trial.to_dict() for trial in self.trials],
            "journal": self.where,
        }


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.to_dict()


def calibrate(
    source: Source,
    measure: Measure,
    prompts: CalibrationPrompts,
    settings: CalibrationSettings,
    place: StudyPlace,
    reference: Source | None = None,
    monitor: Monitor | None = None,
) -> CalibrationResult:
    """Learn a correction for the source's trajectory.

    The search maximises the mean score of the calibration prompts.  Then the base solver and the
    winner alone are evaluated on the held-out prompts.  The study at ``place`` is named by the
    descriptions of source and measure: the same call continues a run that was killed, to the same
    result, and a finished run evaluates nothing.  ``reference`` is the unquantized model, for the
    control and the pre-check.

    Before the search: CalibrationError if ``place`` can't be used or the held-out prompts are too
    few for an interval; SourceError if the reference is another model.  During the search
    CalibrationError wraps errors of source and measure about input and shapes.  Any other exception
    passes through; the study keeps the finished trials.
    """
    identity = Candidate.identity(source.trajectory)
    grid = check_grid(settings.grid, source.trajectory.steps)
    for name, members in (("calibration", prompts.calibration), ("held-out", prompts.heldout)):
        if len(members) < 2:
            raise CalibrationError(f"one {name} prompt gives no interval; give at least 2")
    if reference is not None:
        check_reference(source, reference)
    search, provenance = settings.search(), provenance_of(source, measure)
    about = study_content(source, search, prompts, provenance)
    study = place.open(about)
    with study as store:
        run = Search(store, source, measure, settings, prompts.calibration, monitor)
        run.course.expect(HELDOUT, 2 * len(prompts.heldout))
        known, checked = "", None
        if reference is not None:
            run.course.expect(CONTROL, 2 * len(prompts.heldout))
            run.course.begin(PRECHECK)
            known = fingerprint(provenance_of(reference, measure))[:24]
            checked = _prechecked(store, f"precheck {known}", source, reference, prompts)
        levels = None
        if settings.learns_levels:
            content = run.noted(
                f"levels {known or 'alone'}",
                lambda: _walked(run, source, prompts.calibration, grid, reference),
            )
            levels = LearnedLevels.from_dict(content)
        run.stages(source.trajectory, levels)
        winner = best_of(run.trials)
        candidates = list(dict.fromkeys((identity, winner.candidate)))
        again = reference is not None and winner is not run.trials[0]
        run.course.expect(HELDOUT, len(candidates) * len(prompts.heldout))
        run.course.expect(CONTROL, again * len(candidates) * len(prompts.heldout))
        run.course.begin(HELDOUT)
        heldout = run.judged("heldout", candidates, prompts.heldout)
        controls = []
        if again:
            run.course.begin(CONTROL)
            controls = run.judged(f"control {known}", candidates, prompts.heldout, reference)
    trials = tuple(run.trials)
    before, after = heldout[0].scores, heldout[-1].scores
    gains = [None, None]
    if winner is not trials[0]:
        gains = [
            paired_interval(trials[0].scores.jaq, winner.scores.jaq),
            paired_interval(before.jaq, after.jaq),
        ]
    verdict = judge(*gains, settings.guard)
    control = None
    if controls:
        scores = [record.scores for record in controls]
        control = Control.of(*scores, (before, after))
    costs = [*trials, *heldout, *controls]
    seconds = sum(cost.seconds for cost in costs)
    nfe = sum(cost.nfe for cost in costs)
    nfe += sum(part.nfe for part in (checked, levels) if part is not None)
    learned = {
        "source": "calibration",
        **provenance,
        "search": {
            **search,
            "trials": len(trials),
            **({} if levels is None else {"levels": levels.describe()}),
        },
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
        **({} if control is None else {"control": control.to_dict()}),
        **({} if checked is None else {"precheck": checked.to_dict()}),
        "verdict": verdict.kind,
        "guarded": verdict.keep_identity,
        "best": winner.candidate.correction.to_json(),
        **_own_trajectory(winner.candidate, source),
        "nfe": nfe,
        "seconds": round(seconds, 1),
    }
    chosen = identity if verdict.keep_identity else winner.candidate
    warnings = tuple(cautions(trials, (before, after), prompts))
    for warning in warnings:
        logger.warning(warning)
    return CalibrationResult(
        schedule=QSchedule(chosen.trajectory, chosen.correction, learned),
        best=winner.candidate,
        verdict=verdict,
        trials=trials,
        calibration=gains[0],
        heldout=gains[1],
        heldout_before=before,
        heldout_after=after,
        warnings=warnings,
        nfe=nfe,
        seconds=seconds,
        journal=place.path(about),
        where=study.where,
        new_trials=run.new_trials,
        control=control,
        precheck=checked,
    )


def _walked(
    run: Search, source: Source, prompts: PromptSet, grid: int, reference: Source | None
) -> dict[str, Any]:
    """The walk along the fine path, as a part of the calibration's course."""
    latents, batches = evaluations(source, len(prompts), grid, reference is not None)
    pictures = -(-latents // source.trajectory.steps)
    run.course.expect(LEVELS, pictures)
    run.course.begin(LEVELS)
    run.course.measuring(pictures, max(1, batches // source.trajectory.steps))
    found = learned_levels(source, prompts, grid, reference, on_step=run.course.step)
    run.course.scored()
    return found.to_dict()


def _own_trajectory(best: Candidate, source: Source) -> dict[str, Any]:
    """What a best candidate on another trajectory than the source's adds to the provenance."""
    same = best.trajectory == source.trajectory
    return {} if same else {"best_trajectory": best.trajectory.to_json()}


def provenance_of(source: Source, measure: Measure) -> dict[str, Any]:
    """Plain JSON of everything that scores depend on, except candidates and prompts."""
    return {**source.describe(), "objective": measure.describe()}


def study_content(
    source: Source, search: dict[str, Any], prompts: CalibrationPrompts, provenance: dict[str, Any]
) -> dict[str, Any]:
    """What a study is about: the same content continues the same study."""
    trajectory = source.trajectory.describe()
    trajectory.pop("options", None)  # the trajectory is in the provenance already
    return {
        "version": SEARCH_VERSION,
        **trajectory,
        "search": search,
        "calibration": prompts.calibration.hash,
        "provenance": provenance,
    }


def _prechecked(
    store: Store, key: str, source: Source, reference: Source, prompts: CalibrationPrompts
) -> PreCheck | None:
    """The pre-check, made once a study and reference; None for a correction that can't be fitted."""
    content = store.get(key)
    if content is None:
        found = compared(source, reference, prompts.calibration)
        if found is None:
            return None
        content = found.to_dict()
        store.put(key, content)
    checked = PreCheck.from_dict(content)
    logger.info(checked.text)
    return checked
