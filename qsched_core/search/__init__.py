"""Learning the coefficients: spaces, strategies, stores, the guard and the calibration."""

from .calibrate import CalibrationResult, calibrate
from .control import Control, Reference
from .database import check_storage
from .engine import Evaluate, Progress, Trial, best_of
from .errors import CalibrationError
from .fidelity import FIDELITIES
from .precheck import PreCheck, precheck
from .settings import CalibrationSettings
from .strategies import STRATEGIES, get_strategy

__all__ = [
    "FIDELITIES",
    "STRATEGIES",
    "CalibrationError",
    "CalibrationResult",
    "CalibrationSettings",
    "Control",
    "Evaluate",
    "PreCheck",
    "Progress",
    "Reference",
    "Trial",
    "best_of",
    "calibrate",
    "check_storage",
    "get_strategy",
    "precheck",
]
