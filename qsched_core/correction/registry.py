"""The kinds of correction that a schedule may hold."""

from __future__ import annotations

from typing import Any

from ..text import shown
from ..validation import ScheduleError
from .base import Correction
from .scalar import ScalarCorrection

KINDS: dict[str, type[Correction]] = {kind.kind: kind for kind in (ScalarCorrection,)}
# What the nodes edit and the search learns; its identity stands for "no correction".
DEFAULT: type[Correction] = ScalarCorrection


def correction_to_json(correction: Correction) -> dict[str, Any]:
    """Plain JSON with the kind."""
    return {"kind": correction.kind, **correction.to_json()}


def correction_from_json(content: Any) -> Correction:
    """The inverse; ScheduleError for an unknown kind, or naming what is wrong with its fields."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ScheduleError(
            f"correction kind={shown(kind)} is not known here; choose one of "
            f"{', '.join(KINDS)}, or update the nodes"
        )
    return KINDS[kind].from_json({k: v for k, v in content.items() if k != "kind"})
