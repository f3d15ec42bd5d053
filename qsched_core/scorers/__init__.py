"""Scorers by name; each lives in one file."""

from __future__ import annotations

from ..text import shown
from . import aesthetic, clip_iqa, hps, noun_phrases, open_clip, pickscore, pyiqa
from .base import Batch, Placement, Scorer, ScorerEntry, ScorerError, Sources, check_images, stay
from .named import NAMED, encoder_name
from .open_clip import DualEncoder, load_file, load_named

SCORERS: dict[str, ScorerEntry] = {
    module.ENTRY.name: module.ENTRY
    for module in (open_clip, noun_phrases, clip_iqa, pyiqa, hps, pickscore, aesthetic)
}


def scorer_names(measures: str = "") -> list[str]:
    """Names for ``measures`` "alignment" or "quality" ("": both), options as ``name:OPTION``."""
    return [
        f"{entry.name}:{entry.option_hint.upper()}" if entry.option_hint else entry.name
        for entry in SCORERS.values()
        if measures in ("", entry.measures)
    ]


def check_scorer(spec: str, measures: str = "", name: str = "") -> tuple[ScorerEntry, str]:
    """The entry and option of ``spec`` (``name`` or ``name:option``).

    ScorerError, calling the input ``name``, if there is no such scorer of that kind, or if it is not
    available (with the reason).
    """
    said = f"{name or measures or 'scorer'}={shown(spec)}"
    called, _, option = spec.strip().partition(":")
    entry = SCORERS.get(called)
    if entry is None or measures not in ("", entry.measures):
        raise ScorerError(f"{said} is unknown; choose one of {', '.join(scorer_names(measures))}")
    if option and not entry.option_hint:
        raise ScorerError(f"{said}: {called} takes no option; write {called!r}")
    reason = entry.available()
    if reason:
        raise ScorerError(f"{said}: {reason}")
    return entry, option


def build_scorer(spec: str, sources: Sources, measures: str = "") -> Scorer:
    """The scorer that ``spec`` names; ScorerError as :func:`check_scorer`."""
    entry, option = check_scorer(spec, measures)
    return entry.build(option, sources)


__all__ = [
    "NAMED",
    "SCORERS",
    "Batch",
    "DualEncoder",
    "Placement",
    "Scorer",
    "ScorerEntry",
    "ScorerError",
    "Sources",
    "build_scorer",
    "check_images",
    "check_scorer",
    "encoder_name",
    "load_file",
    "load_named",
    "scorer_names",
    "stay",
]
