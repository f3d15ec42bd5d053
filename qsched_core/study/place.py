"""Where a study is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .database import Database
from .journal import Journal, fingerprint, journal_path
from .shared import SharedStore


@dataclass(frozen=True)
class StudyPlace:
    """Where a calibration is kept: its file in ``folder``, or the study ``name`` in a ``database``
    that several workers share."""

    folder: Path
    database: Database | None = None
    name: str = ""

    def open(self, content: dict[str, Any]) -> Journal | SharedStore:
        """The store of what is about ``content`` (plain JSON); CalibrationError if it can't be used."""
        if self.database is None:
            return Journal(self.folder, fingerprint(content))
        return SharedStore(self.database, self.name, content)

    def path(self, content: dict[str, Any]) -> Path:
        """The study's file, or of a study in a database the path that it would have.

        Other files of the calibration are kept beside it."""
        return journal_path(self.folder, fingerprint(content))
