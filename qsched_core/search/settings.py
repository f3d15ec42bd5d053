"""How to search: one validated description."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..optional import MissingDependencyError
from ..study.errors import CalibrationError
from ..text import shown
from ..trajectory import Trajectory
from .levels import LearnedLevels, check_grid
from .plan import Plan
from .pruners import get_pruner
from .space import check_radius, check_range
from .strategies import get_strategy


@dataclass(frozen=True)
class CalibrationSettings:
    """How to search.

    ``budget`` counts candidates beside c = 1; 0 is the strategy's default.  ``low`` and ``high``
    bound the ramp's values (None: the strategy's own), ``ends`` searches where the ramps end as
    well as where they start, ``radius`` bounds the per-step refinement.  ``pruner`` is how early
    bad candidates are given up.  A sampler makes ``proposals`` at a time; they are evaluated
    together.  Of candidates that don't depend on results ``together`` are evaluated at a time; this
    does not change any result.  ``grid`` is the steps of the fine path whose levels dynamic
    programming chooses from (0: 32).
    Raises CalibrationError on any invalid field, MissingDependencyError if something needs a package.
    """

    strategy: str = "gp"
    budget: int = 0
    seed: int = 0
    guard: bool = True
    low: float | None = None
    high: float | None = None
    radius: float = 0.1
    ends: bool = False
    pruner: str = "full"
    proposals: int = 1
    together: int = 4
    grid: int = 0

    def __post_init__(self):
        strategy, pruner = get_strategy(self.strategy), get_pruner(self.pruner)
        object.__setattr__(self, "budget", strategy.budget(self.budget, self.ends))
        for name, default in zip(("low", "high"), strategy.box, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.seed < 0:
            raise CalibrationError(f"seed={self.seed} may not be negative")
        for name in ("proposals", "together"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name}={shown(getattr(self, name))} must be at least 1")
        if self.ends and not strategy.ramp:
            raise CalibrationError(
                f"ends=True has no meaning for search {self.strategy!r}, which has no ramp"
            )
        if strategy.whole and self.pruner != "full":
            raise CalibrationError(
                f"fidelity={self.pruner!r} has no meaning for search {self.strategy!r}, which compares "
                "the candidates of a round; set it to 'full'"
            )
        if self.grid and not strategy.levels:
            raise CalibrationError(
                f"grid={shown(self.grid)} has no meaning for search {self.strategy!r}, which takes "
                "the scheduler's noise levels; set it to 0"
            )
        check_grid(self.grid)
        check_range(self.low, self.high)
        check_radius(self.radius)
        reason = strategy.available() or pruner.available()
        if reason:
            raise MissingDependencyError(reason)

    @property
    def learns_levels(self) -> bool:
        """Whether the plan needs what dynamic programming finds."""
        return get_strategy(self.strategy).levels

    @property
    def searches_levels(self) -> bool:
        """Whether the plan needs the smallest noise level that may be searched."""
        return get_strategy(self.strategy).searches_levels

    def plan(
        self, trajectory: Trajectory, levels: LearnedLevels | None = None, lowest: float = 0.0
    ) -> Plan:
        return Plan(
            trajectory,
            self.budget,
            self.seed,
            self.low,
            self.high,
            self.radius,
            self.ends,
            levels,
            lowest,
        )

    def search(self) -> dict[str, Any]:
        """What the proposals depend on: plain JSON."""
        content = asdict(self)
        content["fidelity"] = content.pop("pruner")  # the pruner's name in existing studies
        if not content["grid"]:
            del content["grid"]  # as in studies of searches that have none
        return {name: v for name, v in content.items() if name not in ("guard", "together")}
