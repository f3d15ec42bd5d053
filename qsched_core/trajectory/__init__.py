"""The way from noise to a picture: noise levels, a solver for each step, and many ways at once."""

from .observed import Observed, observed
from .rollout import MEMO_BYTES, EvaluationMemo, Rollout, by_trajectory, rollout, tile
from .trajectory import Candidate, StepSolver, Trajectory

__all__ = [
    "MEMO_BYTES",
    "Candidate",
    "EvaluationMemo",
    "Observed",
    "Rollout",
    "StepSolver",
    "Trajectory",
    "by_trajectory",
    "observed",
    "rollout",
    "tile",
]
