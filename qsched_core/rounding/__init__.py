"""Calibrated rounding: weights rounded for the inputs that the model really gets."""

from .budget import LADDER, Allocation, Budget, LayerCost, Option, allocate
from .budget_picture import budget_picture
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
from .sized import (
    WEIGHING,
    Point,
    SizedResult,
    calibrate_to_size,
    sized_figures,
    sized_report,
)
from .states import RecordedStates
from .subject import Subject, TaskSubject
from .walk import BlockDone, Limits, Progress, calibrate_module, choices, quantized

__all__ = [
    "GRIDS",
    "LADDER",
    "PROVING",
    "REASONS",
    "SAMPLING",
    "WEIGHING",
    "Allocation",
    "BlockDone",
    "Budget",
    "Calibrated",
    "Gathering",
    "LayerCost",
    "Limits",
    "Moments",
    "Option",
    "Point",
    "Progress",
    "Proof",
    "RecordedStates",
    "RoundedWeights",
    "RoundingError",
    "RoundingSettings",
    "Sample",
    "Shelf",
    "SizedResult",
    "Subject",
    "TaskSubject",
    "WeightsResult",
    "allocate",
    "budget_picture",
    "calibrate_layer",
    "calibrate_module",
    "calibrate_to_size",
    "calibrate_weights",
    "choices",
    "figures",
    "grid_of",
    "quantized",
    "refusal",
    "report",
    "rounded_plainly",
    "sized_figures",
    "sized_report",
    "verdict",
]
