"""Evaluation: arms over the same prompts, scores with intervals, Frechet distances; resumable."""

from .base import FeatureSpace
from .frechet import frechet_distance
from .results import Evaluation
from .run import SOURCE_BYTES, Arm, Progress, evaluate
from .spaces import encoder_space, usable_spaces
from .study import EvaluationError

__all__ = [
    "SOURCE_BYTES",
    "Arm",
    "Evaluation",
    "EvaluationError",
    "FeatureSpace",
    "Progress",
    "encoder_space",
    "evaluate",
    "frechet_distance",
    "usable_spaces",
]
