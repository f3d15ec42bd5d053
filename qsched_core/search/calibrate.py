"""The calibration: search on some prompts, judge on others, keep everything on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..objective import Scores
from ..precondition import ScalarCorrection
from ..prompts import CalibrationPrompts
from ..schedule import QSchedule
from .cautions import cautions
from .control import Control, Reference
from .database import Database
from .engine import Evaluate, Progress, Search, Trial, best_of
from .errors import CalibrationError
from .guard import Interval, Verdict, judge, paired_interval
from .journal import Journal, fingerprint, journal_path
from .precheck import PreCheck
from .settings import CalibrationSettings
from .shared import SharedStore
from .store import Store

logger = logging.getLogger(__name__)

SEARCH_VERSION = 2  # part of every study's name: raise it when proposals change


@dataclass(frozen=True)
class CalibrationResult:
    """``schedule`` is what the guard lets through, ``best`` the search's own winner.

    The intervals are of the winner's gain over c = 1, and None where nothing beat c = 1.
    ``new_trials`` were evaluated in this call, the others came from ``where`` the study is kept.
    ``journal`` is its file, or what its file would be were it not kept in a database.
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
            "control": None if self.control is None else self.control.to_dict(),
            "precheck": None if self.precheck is None else self.precheck.to_dict(),
            "warnings": list(self.warnings),
            "model_evaluations": self.model_evaluations,
            "seconds": self.seconds,
            "new_trials": self.new_trials,
            "trials": [trial.to_dict() for trial in self.trials],
            "journal": self.where,
        }


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.to_dict()


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
    storage: Database | None = None,
    study: str = "",
    idle: Callable[[], None] = lambda: None,
    reference: Reference | None = None,
) -> CalibrationResult:
    """Learn coefficients for the trajectory ``sigmas`` [steps + 1] of ``solver``.

    The search maximises the mean JAQ of the calibration prompts; only c = 1 and its winner are
    then evaluated on the held-out ones.  ``provenance`` (plain JSON: model, objective, size, cfg)
    names the study, whose journal lies in ``folder``: the same call continues a run that was
    killed, to the same result, and a finished one evaluates nothing.  ``count_evaluations`` says
    how many latents went through the model so far.

    Raises CalibrationError before the search if ``folder`` or ``storage`` can't be used or the held-out prompts
    are too few for an interval, and during it if ``evaluate`` gives too few scores; ScheduleError
    for a trajectory that no schedule can have.  What ``evaluate`` raises passes through, and the
    journal keeps what is finished.
    """
    identity = QSchedule.identity(sigmas, solver, flow)
    for name, members in (("calibration", prompts.calibration), ("held-out", prompts.heldout)):
        if len(members) < 2:
            raise CalibrationError(f"one {name} prompt gives no interval; give at least 2")
    search = settings.search()
    content = {
        "version": SEARCH_VERSION,
        "sigmas": list(identity.sigmas),
        "flow": flow,
        "solver": solver,
        "search": search,
        "calibration": prompts.calibration.hash,
        "provenance": dict(provenance),
    }
    name = fingerprint(content)
    place = Journal(folder, name) if storage is None else SharedStore(storage, study, content)
    with place as store:
        run = Search(
            store, evaluate, settings, prompts.calibration, on_trial, count_evaluations, idle
        )
        checked = None if reference is None else _prechecked(store, reference)
        run.stages(identity.steps)
        winner = best_of(run.trials)
        candidates = list(dict.fromkeys((identity.correction(), winner.correction)))
        heldout = run.judged("heldout", candidates, prompts.heldout)
        controls = []
        if reference is not None and winner is not run.trials[0]:
            named = f"control {fingerprint(reference.provenance)[:24]}"
            controls = run.judged(named, candidates, prompts.heldout, reference.evaluate)
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
    evaluations = sum(cost.model_evaluations for cost in costs)
    if checked is not None:
        evaluations += checked.model_evaluations
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
        **({} if control is None else {"control": control.to_dict()}),
        **({} if checked is None else {"precheck": checked.to_dict()}),
        "verdict": verdict.kind,
        "guarded": verdict.keep_identity,
        "best": asdict(winner.correction),
        "model_evaluations": evaluations,
        "seconds": round(seconds, 1),
    }
    chosen = identity.correction() if verdict.keep_identity else winner.correction
    warnings = tuple(cautions(trials, (before, after), prompts))
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
        journal=journal_path(folder, name),
        where=place.where,
        new_trials=run.new_trials,
        control=control,
        precheck=checked,
    )


def _prechecked(store: Store, reference: Reference) -> PreCheck | None:
    """The pre-check, made once a study and reference."""
    if reference.precheck is None:
        return None
    key = f"precheck {fingerprint(reference.provenance)[:24]}"
    content = store.get(key)
    if content is None:
        content = reference.precheck().to_dict()
        store.put(key, content)
    checked = PreCheck.from_dict(content)
    logger.info(checked.text)
    return checked
