"""How candidates are found: spaces, strategies, samplers, pruners, and the engine that runs them."""

from .course import Standing
from .engine import Monitor, Progress, Search, Trial, best_of
from .pruners import PRUNERS
from .settings import CalibrationSettings
from .strategies import STRATEGIES, get_strategy

__all__ = [
    "PRUNERS",
    "STRATEGIES",
    "CalibrationSettings",
    "Monitor",
    "Progress",
    "Search",
    "Standing",
    "Trial",
    "best_of",
    "get_strategy",
]
