"""The study on disk: one Optuna journal a study, one appended line a finished trial.

The file is an Optuna JournalStorage of JSON lines (optuna-dashboard opens it).  A trial is appended
once, when it is finished; the samplers work on a copy in memory.  So a killed search leaves nothing
half done, and what a resumed one proposes depends on the finished trials alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import check_room, disk_error
from ..optional import require
from ..workspace import remove_abandoned
from .errors import CalibrationError
from .seal import SEALED, VALUE, Reader, sealed
from .store import Box, Point, Record, choices_of

MIN_FREE_BYTES = 16 * 2**20  # a journal of 200 trials with 100 prompts is about 2 MiB
LINE_BYTES = 2**16


def _optuna():
    return require("optuna", "the search", "optuna")


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of plain JSON; TypeError or ValueError if it is not that."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def distributions(space: Box) -> dict:
    """The box as Optuna's distributions."""
    made, choices = _optuna().distributions, choices_of(space)
    return {
        name: made.CategoricalDistribution([float(k) for k in range(int(ends[1]) + 1)])
        if name in choices
        else made.FloatDistribution(*ends)
        for name, ends in space.bounds.items()
    }


def finished_trial(
    space: Box, point: Point, value: float, attributes: Mapping[str, Any] | None = None
):
    """A finished Optuna trial at ``point``, to be added to a study."""
    return _optuna().trial.create_trial(
        params=dict(point),
        distributions=distributions(space),
        value=value,
        user_attrs=dict(attributes or {}),
    )


def journal_path(folder: str | Path, name: str) -> Path:
    """The file of the study ``name`` (a fingerprint) in ``folder``."""
    return Path(folder) / f"{name[:24]}.journal"


class Journal:
    """The file of the study ``name`` (a fingerprint) in ``folder``; a context manager.

    While it is open no other may open it, in this process or another.  Raises CalibrationError where the
    folder can't be written, is nearly full, or the study is running elsewhere.
    """

    def __init__(self, folder: str | Path, name: str):
        self.name = name
        self.path = journal_path(folder, name)
        self.where = str(self.path)
        self._studies: dict[str, Any] = {}
        self._reader = Reader(f"the study {self.path}")

    def __enter__(self) -> Journal:
        self._check_folder()
        self._lock = _locked(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception):
        self._studies.clear()
        self._lock.release()

    def _check_folder(self) -> None:
        remove_abandoned(self.path.parent)
        try:
            check_room(self.path, MIN_FREE_BYTES)
        except OSError as error:
            raise CalibrationError(str(error)) from None

    def _open(self) -> None:
        storages = _optuna().storages
        try:
            _drop_torn_line(self.path)
            _check_lines(self.path)
            backend = storages.journal.JournalFileBackend(str(self.path), lock_obj=_HeldLock())
            self._storage = storages.JournalStorage(backend)
            self._names = {study.study_name for study in self._storage.get_all_studies()}
        except CalibrationError:
            raise
        except OSError as error:
            raise CalibrationError(f"the study {self.path} can't be opened: {error}") from None
        except Exception as error:  # Optuna takes the lines as they are: anything can be wrong
            raise CalibrationError(
                f"the study {self.path} is damaged ({type(error).__name__}: {error}); delete it to "
                "search anew"
            ) from None

    def _older(self, stage: str) -> bool:
        """Whether an earlier version began the stage, without checksums."""
        return f"{self.name}:{stage}" in self._names

    def _study(self, stage: str):
        if stage not in self._studies:
            name, optuna = f"{self.name}:{stage}{'' if self._older(stage) else SEALED}", _optuna()
            if name in self._names:
                study = optuna.load_study(study_name=name, storage=self._storage)
            else:
                with _appending(self.path):
                    study = optuna.create_study(
                        storage=self._storage, study_name=name, direction="maximize"
                    )
            self._studies[stage] = study
        return self._studies[stage]

    def records(self, stage: str) -> dict[int, Record]:
        """The finished trials of ``stage`` by slot, in the order of slots; not those that are damaged."""
        trials = self._study(stage).get_trials(deepcopy=False)
        older = self._older(stage)
        found = [
            self._reader.record(stage, t.number, t.params, t.user_attrs, older) for t in trials
        ]
        records = [record for record in found if record is not None]
        return {r.slot: r for r in sorted(records, key=lambda r: r.slot)}

    def working(self, stage: str) -> dict[int, Point]:
        """Nothing: no other process may open this journal."""
        return {}

    def claim(self, stage: str, space: Box, points: Mapping[int, Point]) -> _Claim:
        """All of ``points``."""
        return _Claim(self._study(stage), stage, self.path, space, points)

    def get(self, key: str) -> Any:
        """What was put under ``key``; None where there is nothing, or it is damaged."""
        kept = self._study("notes").user_attrs.get(key)
        return self._reader.note(key, kept, self._older("notes"))

    def put(self, key: str, value: Any) -> None:
        """Keep plain JSON beside the trials."""
        study = self._study("notes")
        kept = value if self._older("notes") else sealed(key, {VALUE: value})
        with _appending(self.path):
            study.set_user_attr(key, kept)


class _Claim:
    """Slots of a study that has one worker: nothing is written before they are finished."""

    def __init__(self, study, stage: str, path: Path, space: Box, points: Mapping[int, Point]):
        self.study, self.stage, self.path = study, stage, path
        self.space, self.points = space, points

    def __enter__(self) -> _Claim:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def finish(self, record: Record) -> None:
        value, attributes = record.scores.mean(), sealed(self.stage, record.attributes())
        trial = finished_trial(self.space, record.point, value, attributes)
        with _appending(self.path):
            self.study.add_trial(trial)


class _HeldLock:
    """Takes the place of Optuna's lock: the file is ours alone while the journal is open.

    Optuna's own lock files would outlive a killed process; the system's lock does not.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def _appending(path: Path) -> Iterator[None]:
    """CalibrationError, which names the study's file, where the disk refuses a line."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"{disk_error(error, path, LINE_BYTES)}; run the same again then: finished trials are kept"
        ) from error


def _drop_torn_line(path: Path) -> None:
    # A process killed while it appended leaves a line without an end; Optuna would append to it.
    with suppress(FileNotFoundError), open(path, "r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)


def _check_lines(path: Path) -> None:
    # Optuna names no line, and reads on over a damaged last one to fail at what it appends to it.
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                # others number the studies, which trials are kept by
                alone = line.startswith((b'{"op_code":2,', b'{"op_code":4,'))
                mend = "that line to evaluate what it held again, or the file" if alone else "it"
                raise CalibrationError(
                    f"the study {path} is damaged in line {number} ({error}); delete {mend} to "
                    "search anew"
                ) from None


def _locked(path: Path) -> FileLock:
    """The lock of the journal ``path``, held; the system frees it when the process ends."""
    lock = FileLock(path.with_suffix(".lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise CalibrationError(
            f"this calibration is running already ({path}); wait for it"
        ) from None
    except OSError as error:
        raise CalibrationError(f"the study {path} can't be locked: {error}") from None
    return lock
