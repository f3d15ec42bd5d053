"""Calibrated rounding: weights rounded for the inputs that the model really gets."""

from .errors import RoundingError
from .file import RoundedWeights
from .grids import GRIDS, REASONS, grid_of, refusal
from .layer import Calibrated, RoundingSettings, calibrate_layer
from .moments import Gathering, Moments
from .proof import Proof, Sample
from .run import (
    PROVING,
    SAMPLING,
    WeightsResult,
    calibrate_weights,
    figures,
    report,
    rounded_plainly,
    verdict,
)
from .shelf import Shelf
from .states import RecordedStates
from .subject import Subject, TaskSubject
from .walk import BlockDone, Limits, Progress, calibrate_module, choices, quantized

__all__ = [
    "GRIDS",
    "PROVING",
    "REASONS",
    "SAMPLING",
    "BlockDone",
    "Calibrated",
    "Gathering",
    "Limits",
    "Moments",
    "Progress",
    "Proof",
    "RecordedStates",
    "RoundedWeights",
    "RoundingError",
    "RoundingSettings",
    "Sample",
    "Shelf",
    "Subject",
    "TaskSubject",
    "WeightsResult",
    "calibrate_layer",
    "calibrate_module",
    "calibrate_weights",
    "choices",
    "figures",
    "grid_of",
    "quantized",
    "refusal",
    "report",
    "rounded_plainly",
    "verdict",
]
