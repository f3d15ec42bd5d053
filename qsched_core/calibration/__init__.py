"""From a source to a schedule: search, then guard, control, pre-check and cautions."""

from .calibrate import CalibrationResult, calibrate, provenance_of
from .control import Control
from .guard import Verdict, judge
from .precheck import PreCheck, precheck

__all__ = [
    "CalibrationResult",
    "Control",
    "PreCheck",
    "Verdict",
    "calibrate",
    "judge",
    "precheck",
    "provenance_of",
]
