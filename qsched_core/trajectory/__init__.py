"""The way from noise to a picture: noise levels, a solver for each step, and many ways at once."""

from .levels import MOST_STEPS, Fit, GridPath, best_paths, edges, square
from .observed import Observed, observed
from .rollout import MEMO_BYTES, EvaluationMemo, Rollout, by_trajectory, rollout, tile
from .trajectory import Candidate, StepSolver, Trajectory

__all__ = [
    "MEMO_BYTES",
    "MOST_STEPS",
    "Candidate",
    "EvaluationMemo",
    "Fit",
    "GridPath",
    "Observed",
    "Rollout",
    "StepSolver",
    "Trajectory",
    "best_paths",
    "by_trajectory",
    "edges",
    "observed",
    "rollout",
    "square",
    "tile",
]
