"""Learning the coefficients: spaces, strategies, stores, the guard and the calibration."""

from .calibrate import CalibrationResult, calibrate
from .control import Control, Reference
from .database import COMMAND_LINE, Database, StorageRule, check_shared, workflow_rule
from .engine import Evaluate, Progress, Trial, best_of
from .errors import CalibrationError
from .fidelity import FIDELITIES
from .precheck import PreCheck, precheck
from .settings import CalibrationSettings
from .strategies import STRATEGIES, get_strategy

__all__ = [
    "COMMAND_LINE",
    "FIDELITIES",
    "STRATEGIES",
    "CalibrationError",
    "CalibrationResult",
    "CalibrationSettings",
    "Control",
    "Database",
    "Evaluate",
    "PreCheck",
    "Progress",
    "Reference",
    "StorageRule",
    "Trial",
    "best_of",
    "calibrate",
    "check_shared",
    "get_strategy",
    "precheck",
    "workflow_rule",
]
