"""A person's rankings on disk: one small JSON file a study, written whole after each change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import write_atomic
from ..text import shown
from .errors import CalibrationError
from .journal import fingerprint

FORMAT, VERSION = "qsched ranking", 1
MOST_ROUNDS = 1000
MOST_NOTES = 100  # the oldest go first


@dataclass(frozen=True)
class Entry:
    """``text`` is the ranking as it was written, ``told`` what was computed from it, to be read."""

    text: str
    named_round: bool
    told: Mapping[str, Any] = field(default_factory=dict)


class RankingStudy:
    """The rankings of what is about ``content`` (plain JSON), in ``folder``; a context manager.

    While it is open no other may open it.  CalibrationError where the file can't be read or written.
    """

    def __init__(self, folder: str | Path, content: Mapping[str, Any]):
        self.content = dict(content)
        self.path = Path(folder) / f"ranking-{fingerprint(self.content)[:24]}.json"
        self.entries: list[Entry] = []
        self.notes: dict[str, tuple[float, ...]] = {}

    def __enter__(self) -> RankingStudy:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_suffix(".lock"), timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout:
            raise CalibrationError(f"the study {self.path} is in use; try again") from None
        except OSError as error:
            raise CalibrationError(f"the study {self.path} can't be opened: {error}") from None
        try:
            self.entries, self.notes = self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._lock.release()

    def _read(self) -> tuple[list[Entry], dict[str, tuple[float, ...]]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"version {shown(content['version'])} is not known here")
            entries = [
                Entry(str(e["ranking"]), bool(e["named_round"]), dict(e["told"]))
                for e in content["rounds"][:MOST_ROUNDS]
            ]
            noted = dict(content.get("notes", {})).items()
            return entries, {str(k): tuple(float(v) for v in values) for k, values in noted}
        except FileNotFoundError:
            return [], {}
        except OSError as error:
            raise CalibrationError(f"the study {self.path} can't be read: {error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise CalibrationError(
                f"the study {self.path} is damaged ({error}); delete it to begin anew"
            ) from None

    def append(self, entry: Entry) -> None:
        """Keep the ranking; on return it is on disk."""
        if len(self.entries) >= MOST_ROUNDS:
            raise CalibrationError(f"{MOST_ROUNDS} rounds are the most that a study may have")
        self._write([*self.entries, entry], self.notes)

    def noted(self, key: str, make: Callable[[], Sequence[float]]) -> tuple[float, ...]:
        """What ``make`` gave for ``key``, kept with the rankings: it is made once."""
        if key not in self.notes:
            notes = {**self.notes, key: tuple(float(value) for value in make())}
            self._write(self.entries, dict(list(notes.items())[-MOST_NOTES:]))
        return self.notes[key]

    def _write(self, entries: list[Entry], notes: dict[str, tuple[float, ...]]) -> None:
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "content": self.content,
            "rounds": [
                {"ranking": e.text, "named_round": e.named_round, "told": dict(e.told)}
                for e in entries
            ],
        }
        if notes:
            content["notes"] = {key: list(values) for key, values in notes.items()}
        try:
            write_atomic(self.path, json.dumps(content, indent=1))
        except OSError as error:
            raise CalibrationError(f"the study {self.path} can't be written: {error}") from None
        self.entries, self.notes = entries, notes
