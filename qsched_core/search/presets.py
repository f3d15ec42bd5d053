"""How thorough a search shall be, for a user who does not want to choose its parts."""

from __future__ import annotations

from dataclasses import dataclass

from ..study.errors import CalibrationError
from ..text import shown


@dataclass(frozen=True)
class Preset:
    """A strategy and its budget of candidates; ``strategy`` "" leaves both to the user's own."""

    name: str
    summary: str
    strategy: str = ""
    budget: int = 0


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("quick", "12 candidates: a first look", "gp", 12),
        Preset("normal", "what search and budget say; by themselves 24 candidates"),
        Preset("thorough", "64 candidates, single steps too", "gp+steps", 64),
    )
}
OWN = "normal"  # what a workflow from before there were presets means


def chosen(preset: str, strategy: str, budget: int) -> tuple[str, int]:
    """Strategy and budget under ``preset``; CalibrationError, naming the known ones, for another."""
    if preset not in PRESETS:
        raise CalibrationError(
            f"preset={shown(preset)} is unknown; choose one of {', '.join(PRESETS)}"
        )
    entry = PRESETS[preset]
    return (entry.strategy, entry.budget) if entry.strategy else (strategy, budget)
