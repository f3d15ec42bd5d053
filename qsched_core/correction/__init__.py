"""What is done to a step's latent and prediction: the kinds of correction, one file each."""

from .around import AroundCorrection, CorrectedModel
from .base import Correction, Parameter, StepCorrection
from .registry import DEFAULT, KINDS, correction_from_json, correction_to_json
from .scalar import ScalarCorrection

__all__ = [
    "DEFAULT",
    "KINDS",
    "AroundCorrection",
    "CorrectedModel",
    "Correction",
    "Parameter",
    "ScalarCorrection",
    "StepCorrection",
    "correction_from_json",
    "correction_to_json",
]
