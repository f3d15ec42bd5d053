"""What every kind of correction offers: to solvers, to the search, to files, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ..sigmas import SigmaMatch
from ..validation import ScheduleError


class StepCorrection(Protocol):
    """What a solver calls after each model evaluation."""

    def __call__(
        self, step: int, x: torch.Tensor, denoised: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrected (x', D') of ``step`` from latents x and the prediction D [n, ...].

        ``mask`` (broadcastable, 0 to 1) is 1 where the model is responsible.  A step that changes
        nothing returns the inputs themselves, so that the base solver stays bit for bit.
        """
        ...

    def intermediate(
        self, step: int, x: torch.Tensor, denoised: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Corrected D' of a further evaluation inside ``step``, at an x made of the corrected x'."""
        ...


@dataclass(frozen=True)
class Parameter:
    """A number that a kind of correction has at every step, as a user sees and edits it.

    ``neutral`` changes nothing; values lie in [``low``, ``high``].
    """

    name: str
    summary: str
    low: float
    high: float
    neutral: float = 1.0

    def check(self, name: str, value: float) -> None:
        """ScheduleError, which calls the number ``name``, unless it is in range."""
        if not self.low <= value <= self.high:
            raise ScheduleError(
                f"{name}={value:.6g} is outside [{self.low}, {self.high}]; useful values are near "
                f"{self.neutral:g}"
            )


class Correction(StepCorrection, Protocol):
    """A learned correction of a trajectory: immutable, comparable and hashable.

    ``kind`` names it in files; ``parameters`` are the numbers it has at each step.
    """

    kind: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]

    @property
    def steps(self) -> int: ...

    @property
    def is_identity(self) -> bool:
        """Whether this changes nothing at any step."""
        ...

    @classmethod
    def identity(cls, steps: int) -> Correction:
        """The correction that changes nothing."""
        ...

    @classmethod
    def ramp(cls, ends: Mapping[str, tuple[float, float]], steps: int) -> Correction:
        """Each named parameter runs linearly from its start to its end; the others are neutral."""
        ...

    def rows(self) -> dict[str, tuple[float, ...]]:
        """The numbers by parameter, one a step: for tables, charts and edits."""
        ...

    def with_rows(self, rows: Mapping[str, Sequence[float]]) -> Correction:
        """A copy with the named rows replaced; ScheduleError for what they may not hold."""
        ...

    def at(self, matches: Sequence[SigmaMatch]) -> Correction:
        """The correction at other noise levels: one step a match."""
        ...

    @classmethod
    def stack(cls, corrections: Sequence[Correction]) -> StepCorrection:
        """Many candidates in one batch [candidates * samples, ...], samples varying fastest."""
        ...

    @staticmethod
    def euler_basis(
        x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float
    ) -> torch.Tensor | None:
        """What Euler's corrected step is a linear combination of [*x.shape, numbers].

        None for a kind that is not linear in its numbers.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the kind; :meth:`from_json` is its inverse."""
        ...

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Correction:
        """ScheduleError names what is wrong with ``content``."""
        ...
