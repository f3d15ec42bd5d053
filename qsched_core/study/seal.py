"""A checksum with everything that a study keeps: what was damaged on disk is never taken for a result.

A study that is kept with checksums says so in its name (``SEALED``), so that a checksum which is gone
is damage there.  Studies of earlier versions have other names and go on without.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from .store import Point, Record

logger = logging.getLogger(__name__)

SEALED = " (sealed)"
SUM, VALUE = "sum", "value"


def digest(value: Any) -> str:
    """SHA-256 (hex) of plain JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(place: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with its checksum, which also holds the place in the study that it is for."""
    return {**content, SUM: digest([place, content])}


class Reader:
    """What is intact of a study; the rest is named in the log, once, and read as not there.

    ``where`` names the study to the user.  What is ``older`` may be without a checksum.
    """

    def __init__(self, where: str):
        self.where = where
        self._told: set[str] = set()
        # What did not change since is not checked again: every proposal looks at all trials.
        self._read: dict[tuple[str, int], tuple[Any, Record]] = {}

    def record(
        self, stage: str, number: int, point: Point, attributes: Any, older: bool
    ) -> Record | None:
        """The record of trial ``number`` of ``stage``; None where it is damaged."""
        kept = self._read.get((stage, number))
        if kept is not None and kept[0] == (point, attributes):
            return kept[1]
        try:
            content = dict(attributes)
            if not self._intact(stage, content, older):
                raise ValueError("its checksum differs")
            record = Record.of(point, content)
            self._read[stage, number] = (point, attributes), record
            return record
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._tell(f"trial {number} of {stage!r}", error)
            return None

    def note(self, key: str, kept: Any, older: bool) -> Any:
        """What was put under ``key``; None where it is damaged."""
        if kept is None or older:
            return kept
        try:
            content = dict(kept)
            if not self._intact(key, content, older):
                raise ValueError("its checksum differs")
            return content[VALUE]
        except (ValueError, LookupError, TypeError) as error:
            self._tell(f"the note {key!r}", error)
            return None

    @staticmethod
    def _intact(place: str, content: dict[str, Any], older: bool) -> bool:
        found = content.pop(SUM, None)
        return found == digest([place, content]) if found is not None else older

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(
                "%s: %s is damaged (%s: %s) and not used; it is made again",
                self.where,
                what,
                type(error).__name__,
                error,
            )
