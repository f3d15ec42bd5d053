"""Learning the coefficients: spaces, strategies, the journal, the guard and the calibration."""

from .calibrate import CalibrationResult, CalibrationSettings, Progress, Trial, calibrate
from .errors import CalibrationError
from .strategies import STRATEGIES, get_strategy

__all__ = [
    "STRATEGIES",
    "CalibrationError",
    "CalibrationResult",
    "CalibrationSettings",
    "Progress",
    "Trial",
    "calibrate",
    "get_strategy",
]
