"""Calibrated rounding: weights rounded for the inputs that the model really gets."""

from .errors import RoundingError
from .file import RoundedWeights, Shelf
from .grids import GRIDS, REASONS, grid_of, refusal
from .layer import Calibrated, RoundingSettings, calibrate_layer
from .moments import Gathering, Moments
from .proof import Proof
from .run import WeightsResult, calibrate_weights, report, rounded_plainly
from .states import TaskStates
from .walk import BlockDone, calibrate_module, choices, quantized

__all__ = [
    "GRIDS",
    "REASONS",
    "BlockDone",
    "Calibrated",
    "Gathering",
    "Moments",
    "Proof",
    "RoundedWeights",
    "RoundingError",
    "RoundingSettings",
    "Shelf",
    "TaskStates",
    "WeightsResult",
    "calibrate_layer",
    "calibrate_module",
    "calibrate_weights",
    "choices",
    "grid_of",
    "quantized",
    "refusal",
    "report",
    "rounded_plainly",
]
