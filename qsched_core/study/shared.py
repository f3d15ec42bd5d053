"""A study in a database, searched by several workers: Optuna's RDB storage (PostgreSQL, MySQL, SQLite).

A slot is taken by creating a running trial that names it.  Trial numbers are given out by the
database one at a time, so of two trials for one slot the lower number has it.  While a worker is at
a trial it counts up the trial's ``beat``; when that stands still, others take the worker for dead
and the slot is free again.  Nothing compares clocks of different machines.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..optional import require
from ..text import plain
from .database import DRIVERS, Database, check_shared
from .errors import CalibrationError
from .failures import failure
from .journal import distributions, fingerprint
from .pieces import pieces, whole
from .seal import SEALED, VALUE, Reader, sealed
from .store import Box, Point, Record

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 3.0
GRACE_VARIABLE, GRACE_SECONDS = "QSCHED_GRACE_SECONDS", 30.0
CONNECT_SECONDS = 10
PATIENCE = (0.5, 1, 2, 4, 8, 16)  # seconds between tries of a database that does not answer
# SQLAlchemy's pools log what a driver says about a connection that breaks: ours go unheard.
POOLS, POOL_NAME = ("QueuePool", "NullPool", "SingletonThreadPool", "StaticPool"), "qsched"


class SharedStore:
    """The study ``name`` in ``database``; a context manager.

    ``content`` is what the study is about, plain JSON: another's is refused.  ``grace`` is how many
    seconds a worker may be silent.  CalibrationError for a database that can't be used or does not
    answer, and a study of that name that is about something else.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        content: Mapping[str, Any],
        grace: float | None = None,
    ):
        self.name, self.content = check_shared(database, name), dict(content)
        self.database = database
        self.grace = _grace() if grace is None else grace
        self.where = f"study {self.name!r} in {database.label}"
        self._studies: dict[str, int] = {}
        self._older = False  # begun by an earlier version, without checksums
        self._reader = Reader(self.where)
        self._heartbeats: dict[
            int, tuple[int, float]
        ] = {}  # trial: its beat, and when it was first seen

    def __enter__(self) -> SharedStore:
        self._storage = self._connect()
        try:
            self._check_content()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._studies.clear()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _connect(self):
        optuna = require("optuna", "the search", "optuna")
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        for pool in POOLS:
            logging.getLogger(f"sqlalchemy.pool.impl.{pool}.{POOL_NAME}").disabled = True
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_logging_name": POOL_NAME}
        url = self.database.url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a template
        try:
            if make_url(self.database.url).get_backend_name() in DRIVERS:
                options["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
            if self.database.file is not None:
                self.database.file.parent.mkdir(parents=True, exist_ok=True)
            # Workers that create the tables of a new database at the same time fail; they try again.
            return _patiently(
                lambda: optuna.storages.RDBStorage(url, engine_kwargs=options),
                (SQLAlchemyError, optuna.exceptions.StorageInternalError),
                PATIENCE[:3],
            )
        except Exception as error:  # whatever a driver raises: its text may hold secrets
            raise CalibrationError(
                f"storage: can't connect to {self.database.label}: {failure(error)}"
            ) from None

    def _check_content(self) -> None:
        duplicated = require("optuna", "the search", "optuna").exceptions.DuplicatedStudyError
        key = "content"
        self._older = self._exists(f"{self.name}/notes")
        try:
            self._studies["notes"] = self._call(
                lambda: self._storage.create_new_study(_maximize(), self._stage_name("notes"))
            )
            self.put(key, self.content)
            return
        except duplicated:
            found = self.get(key)
        for seconds in PATIENCE:  # the worker that made the study may be about to write it
            if found is not None:
                break
            time.sleep(seconds)
            found = self.get(key)
        if found is None:
            raise CalibrationError(
                f"{self.where} was begun but says nothing of itself, or that is damaged; choose "
                "another name"
            )
        if fingerprint(found) != fingerprint(self.content):
            differences = "; ".join(differing(found, self.content)[:4])
            raise CalibrationError(
                f"{self.where} was begun with something else: {differences}; choose another study "
                "name, or the same model, prompts and settings"
            )

    def _call(self, call: Callable[[], Any]) -> Any:
        """Ask the database, again if it does not answer."""
        from sqlalchemy.exc import SQLAlchemyError

        internal = require("optuna", "the search", "optuna").exceptions.StorageInternalError
        try:
            return _patiently(call, (internal,), PATIENCE)
        except (internal, SQLAlchemyError) as error:
            raise CalibrationError(
                f"{self.where}: the database does not answer: {failure(error)}. What was finished "
                "is kept in it: run this again when it does"
            ) from None

    def _read(self, call: Callable[[], Any]) -> Any:
        """Ask the database for what it keeps, of which anything may be damaged."""
        try:
            return self._call(call)
        except CalibrationError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise CalibrationError(
                f"{self.where} is damaged ({type(error).__name__}: {_short(error)}); choose another "
                "study name, or bring back an earlier copy of the database"
            ) from None

    def _exists(self, name: str) -> bool:
        def found() -> bool:
            try:
                self._storage.get_study_id_from_name(name)
            except KeyError:
                return False
            return True

        return self._call(found)

    def _stage_name(self, stage: str) -> str:
        return f"{self.name}/{stage}{'' if self._older else SEALED}"

    def _study(self, stage: str) -> int:
        if stage not in self._studies:
            optuna = require("optuna", "the search", "optuna")
            name = self._stage_name(stage)

            def found() -> int:
                try:
                    return self._storage.create_new_study(_maximize(), name)
                except optuna.exceptions.DuplicatedStudyError:
                    return self._storage.get_study_id_from_name(name)

            self._studies[stage] = self._call(found)
        return self._studies[stage]

    def _trials(self, stage: str) -> list:
        return self._read(lambda: self._storage.get_all_trials(self._study(stage), deepcopy=False))

    def records(self, stage: str) -> dict[int, Record]:
        """The finished trials by slot, in the order of slots; not those that are damaged."""
        found: dict[int, Record] = {}
        for trial in self._trials(stage):
            if (record := self._record(stage, trial)) is not None:
                found.setdefault(record.slot, record)
        return dict(sorted(found.items()))

    def _record(self, stage: str, trial) -> Record | None:
        if trial.state.name != "COMPLETE":
            return None
        try:
            attributes = whole(trial.user_attrs, "record")
        except (ValueError, LookupError, TypeError):
            attributes = None
        return self._reader.record(stage, trial.number, trial.params, attributes, self._older)

    def _holds(self, stage: str, trial, slot: int) -> bool:
        """Whether nobody else is to evaluate the slot, for this trial's sake."""
        if trial.state.name == "RUNNING":
            return trial.user_attrs.get("slot") == slot
        record = self._record(stage, trial)
        return record is not None and record.slot == slot

    def working(self, stage: str) -> dict[int, Point]:
        """What workers are evaluating now, by slot; trials of silent workers are failed."""
        return {
            trial.user_attrs["slot"]: dict(trial.params)
            for trial in self._trials(stage)
            if "slot" in trial.user_attrs and self._alive(trial)
        }

    def _alive(self, trial) -> bool:
        if trial.state.name != "RUNNING":
            return False
        beat, now = trial.user_attrs.get("beat", 0), time.monotonic()
        last, since = self._heartbeats.get(trial._trial_id, (None, now))
        if beat != last:
            self._heartbeats[trial._trial_id] = (beat, now)
            return True
        if now - since < self.grace:
            return True
        logger.warning(
            "%s: a worker (%s) fell silent; its trial is free again",
            self.where,
            _short(trial.user_attrs.get("worker", "unknown")),
        )
        self.fail(trial._trial_id)
        return False

    def fail(self, trial: int) -> None:
        """Give a trial up, unless it was finished meanwhile."""
        optuna = require("optuna", "the search", "optuna")
        state = optuna.trial.TrialState.FAIL
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._call(lambda: self._storage.set_trial_state_values(trial, state))

    def claim(self, stage: str, space: Box, points: Mapping[int, Point]) -> _Claim:
        """Those of ``points`` that no other worker has taken."""
        return _Claim(self, stage, space, points)

    def start(self, stage: str, space: Box, slot: int, point: Point) -> int | None:
        """A running trial for the slot, or None where another has it."""
        optuna = require("optuna", "the search", "optuna")
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=dict(point),
            distributions=distributions(space),
            user_attrs={"slot": slot, "beat": 0, "worker": f"{os.getpid()}@{platform.node()}"},
        )
        study = self._study(stage)
        mine = self._call(lambda: self._storage.create_new_trial(study, template))
        trials = self._trials(stage)
        number = next(trial.number for trial in trials if trial._trial_id == mine)
        for trial in trials:
            if trial.number < number and self._holds(stage, trial, slot):
                self.fail(mine)
                return None
        return mine

    def heartbeat(self, trial: int, count: int) -> None:
        """Say that this worker is at the trial."""
        self._storage.set_trial_user_attr(trial, "beat", count)

    def finish(self, stage: str, trial: int, record: Record) -> None:
        """Scores are written before the state: a complete trial has its scores."""
        optuna = require("optuna", "the search", "optuna")
        state = optuna.trial.TrialState.COMPLETE

        def write() -> None:
            for key, value in pieces("record", sealed(stage, record.attributes())):
                self._storage.set_trial_user_attr(trial, key, value)
            self._storage.set_trial_state_values(trial, state, [record.scores.mean()])

        try:
            self._call(write)
        except optuna.exceptions.UpdateFinishedTrialError:
            logger.warning(
                "%s: this worker was taken for dead, and its trial is another's now", self.where
            )

    def get(self, key: str) -> Any:
        """What was put under ``key``; None where there is nothing, or it is damaged."""
        study = self._study("notes")
        kept = self._read(lambda: whole(self._storage.get_study_user_attrs(study), key))
        return self._reader.note(key, kept, self._older)

    def put(self, key: str, value: Any) -> None:
        """Keep plain JSON beside the trials."""
        study = self._study("notes")
        kept = value if self._older else sealed(key, {VALUE: value})

        def write() -> None:
            for name, piece in pieces(key, kept):
                self._storage.set_study_user_attr(study, name, piece)

        self._call(write)


class _Claim:
    """Running trials of ours, kept alive by a thread until they are finished or given back."""

    def __init__(self, store: SharedStore, stage: str, space: Box, points: Mapping[int, Point]):
        self.store, self.stage, self.space, self.wanted = store, stage, space, points
        self.points: dict[int, Point] = {}
        self._running: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="qsched-study", daemon=True)

    def __enter__(self) -> _Claim:
        try:
            for slot, point in self.wanted.items():
                trial = self.store.start(self.stage, self.space, slot, point)
                if trial is not None:
                    self._running[slot], self.points[slot] = trial, point
        except BaseException:
            self._give_back()
            raise
        if self._running:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._give_back()

    def finish(self, record: Record) -> None:
        self.store.finish(self.stage, self._running.pop(record.slot), record)

    def _give_back(self) -> None:
        for trial in self._running.values():
            try:
                self.store.fail(trial)
            except (
                CalibrationError
            ) as error:  # the database is gone: other workers will see that this one fell silent
                logger.warning("%s", error)
        self._running.clear()

    def _heartbeat(self) -> None:
        count = 0
        while not self._done.wait(min(HEARTBEAT_SECONDS, self.store.grace / 5)):
            count += 1
            for trial in list(self._running.values()):
                try:
                    self.store.heartbeat(trial, count)
                except Exception as error:
                    # The trial was just finished, or the database does not answer: the next beat will show.
                    logger.debug("no beat: %s", type(error).__name__)


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two pieces of plain JSON differ, "path: one, here other" each."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            line
            for key in sorted({*one, *other})
            for line in differing(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if one == other else [f"{_short(path)}: {_short(one)}, here {_short(other)}"]


def _short(value: Any) -> str:
    return plain(str(value), 60)


def _maximize() -> list:
    return [require("optuna", "the search", "optuna").study.StudyDirection.MAXIMIZE]


def _grace() -> float:
    text = os.environ.get(GRACE_VARIABLE, str(GRACE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 86400:
        raise CalibrationError(f"{GRACE_VARIABLE} must be seconds, at least 1")
    return seconds


def _patiently(call: Callable[[], Any], errors: tuple, waits) -> Any:
    for seconds in waits:
        try:
            return call()
        except errors as error:
            logger.info("the study's database: %s; trying again", type(error).__name__)
            time.sleep(seconds)
    return call()
