"""What a search learns and a sampler uses: a trajectory with its correction, and its provenance."""

from ..validation import MAX_STEPS, ScheduleError
from .schedule import EDITS, MODES, Match, QSchedule

__all__ = ["EDITS", "MAX_STEPS", "MODES", "Match", "QSchedule", "ScheduleError"]
