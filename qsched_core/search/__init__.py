"""Learning the coefficients: spaces, strategies, stores, the guard and the calibration."""

from .calibrate import CalibrationResult, calibrate
from .engine import Evaluate, Progress, Trial, best_of
from .errors import CalibrationError
from .fidelity import FIDELITIES
from .settings import CalibrationSettings
from .shared import check_storage
from .strategies import STRATEGIES, get_strategy

__all__ = [
    "FIDELITIES",
    "STRATEGIES",
    "CalibrationError",
    "CalibrationResult",
    "CalibrationSettings",
    "Evaluate",
    "Progress",
    "Trial",
    "best_of",
    "calibrate",
    "check_storage",
    "get_strategy",
]
