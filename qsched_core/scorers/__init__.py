"""Scorers by name; each lives in one file."""

from __future__ import annotations

from . import clip_iqa, open_clip, pyiqa
from .base import Batch, Placement, Scorer, ScorerEntry, ScorerError, check_images, stay
from .open_clip import DualEncoder, load_file, load_named

SCORERS: dict[str, ScorerEntry] = {
    entry.name: entry for entry in (open_clip.ENTRY, clip_iqa.ENTRY, pyiqa.ENTRY)
}


def available_scorers() -> dict[str, str | None]:
    """Every scorer's name with None, or the reason why it can't be used."""
    return {name: entry.available() for name, entry in SCORERS.items()}


def scorer_names(measures: str) -> list[str]:
    """Names for ``measures`` "alignment" or "quality", options shown as ``name:OPTION``."""
    return [
        f"{entry.name}:{entry.option_hint.upper()}" if entry.option_hint else entry.name
        for entry in SCORERS.values()
        if entry.measures == measures
    ]


def check_scorer(spec: str, measures: str) -> tuple[ScorerEntry, str]:
    """The entry and option of ``spec`` (``name`` or ``name:option``).

    ScorerError if there is no such scorer of that kind, or if it is not available (with the reason).
    """
    name, _, option = spec.strip().partition(":")
    entry = SCORERS.get(name)
    if entry is None or entry.measures != measures:
        raise ScorerError(
            f"{measures}={spec!r} is unknown; choose one of {', '.join(scorer_names(measures))}"
        )
    if option and not entry.option_hint:
        raise ScorerError(f"{measures}={spec!r}: {name} takes no option; write {name!r}")
    reason = entry.available()
    if reason:
        raise ScorerError(f"{measures}={spec!r}: {reason}")
    return entry, option


def build_scorer(spec: str, measures: str, encoder: DualEncoder, place: Placement = stay) -> Scorer:
    """The scorer that ``spec`` names; ScorerError as :func:`check_scorer`."""
    entry, option = check_scorer(spec, measures)
    return entry.build(option, encoder, place)


__all__ = [
    "SCORERS",
    "Batch",
    "DualEncoder",
    "Placement",
    "Scorer",
    "ScorerEntry",
    "ScorerError",
    "available_scorers",
    "build_scorer",
    "check_images",
    "check_scorer",
    "load_file",
    "load_named",
    "scorer_names",
    "stay",
]
