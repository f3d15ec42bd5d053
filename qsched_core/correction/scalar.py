"""Two scalars a step: Q-Sched (arXiv 2509.01624), section 3.

With x the noisy latent and D the guided prediction of the clean one, eps = (x - D) / sigma (the
velocity, for flow models), the corrected pair is

    x' = c_x * x
    D' = x' - sigma * c_eps * eps = c_x * x - c_eps * (x - D)

and the base solver makes its step from (x', D').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..sigmas import SigmaMatch
from ..strict_json import take
from ..validation import MAX_STEPS, ScheduleError, numbers
from .base import Parameter

MIN_COEFFICIENT, MAX_COEFFICIENT = 0.25, 4.0  # outside this range every trajectory breaks down


def precondition(
    x: torch.Tensor,
    denoised: torch.Tensor,
    c_x: float | torch.Tensor,
    c_eps: float | torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected (x', D') of latents x, D [n, ...].

    ``c_x`` and ``c_eps`` are numbers, or tensors that broadcast against x (one value a sample).
    Where ``mask`` (broadcastable, 0 to 1) is 0 the pixels are given and both come back unchanged.
    Numbers that are exactly 1 return the inputs themselves, so the base solver stays bit for bit.
    """
    if isinstance(c_x, float) and isinstance(c_eps, float) and c_x == c_eps == 1.0:
        return x, denoised
    scaled = x * c_x
    if isinstance(c_eps, torch.Tensor):
        corrected = torch.addcmul(scaled, x - denoised, c_eps, value=-1)
    else:
        corrected = torch.add(scaled, x - denoised, alpha=-c_eps)
    if mask is not None:
        return torch.lerp(x, scaled, mask), torch.lerp(denoised, corrected, mask)
    return scaled, corrected


@dataclass(frozen=True)
class ScalarCorrection:
    """Two scalars a step, each in [0.25, 4]; ScheduleError names the one that is not."""

    kind: ClassVar[str] = "scalar"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("c_x", "scales the noisy latent", MIN_COEFFICIENT, MAX_COEFFICIENT),
        Parameter("c_eps", "scales the model's output", MIN_COEFFICIENT, MAX_COEFFICIENT),
    )

    c_x: tuple[float, ...]
    c_eps: tuple[float, ...]

    def __post_init__(self):
        for parameter in self.parameters:
            values = numbers(parameter.name, getattr(self, parameter.name))
            object.__setattr__(self, parameter.name, values)
            for position, value in enumerate(values):
                parameter.check(f"{parameter.name}[{position}]", value)
        if len(self.c_x) != len(self.c_eps):
            raise ScheduleError(
                f"c_x has {len(self.c_x)} values and c_eps {len(self.c_eps)}; give one a step"
            )
        if not 1 <= len(self.c_x) <= MAX_STEPS:
            raise ScheduleError(f"c_x has {len(self.c_x)} values; give 1 to {MAX_STEPS}")

    @property
    def steps(self) -> int:
        return len(self.c_x)

    @property
    def is_identity(self) -> bool:
        return all(c == 1.0 for c in self.c_x + self.c_eps)

    @classmethod
    def identity(cls, steps: int) -> ScalarCorrection:
        """c = 1 at every step: the base solver, bit for bit."""
        return cls((1.0,) * steps, (1.0,) * steps)

    @classmethod
    def ramp(cls, ends: Mapping[str, tuple[float, float]], steps: int) -> ScalarCorrection:
        """The paper's parametrisation: each runs linearly from (start) to (end)."""
        return cls(
            **{p.name: linear_ramp(*ends.get(p.name, (1.0, 1.0)), steps) for p in cls.parameters}
        )

    def rows(self) -> dict[str, tuple[float, ...]]:
        return {"c_x": self.c_x, "c_eps": self.c_eps}

    def with_rows(self, rows: Mapping[str, Sequence[float]]) -> ScalarCorrection:
        for name in rows.keys() - self.rows().keys():
            raise ScheduleError(f"{name!r} is no coefficient; there are c_x and c_eps")
        return replace(self, **rows)

    def at(self, matches: Sequence[SigmaMatch]) -> ScalarCorrection:
        return ScalarCorrection(
            tuple(match.pick(self.c_x) for match in matches),
            tuple(match.pick(self.c_eps) for match in matches),
        )

    def __call__(self, step, x, denoised, mask=None):
        return precondition(x, denoised, self.c_x[step], self.c_eps[step], mask)

    def intermediate(self, step, x, denoised, mask=None):
        """The state was scaled by the step's c_x already: D' = x - c_eps * (x - D)."""
        return precondition(x, denoised, 1.0, self.c_eps[step], mask)[1]

    @classmethod
    def stack(cls, corrections: Sequence[ScalarCorrection]) -> ScalarStack:
        return ScalarStack(
            torch.tensor([c.c_x for c in corrections]),
            torch.tensor([c.c_eps for c in corrections]),
        )

    @staticmethod
    def euler_basis(x, denoised, sigma, sigma_next):
        """x_next = c_x * x + (sigma_next - sigma) * c_eps * eps."""
        rate = (sigma_next - sigma) / sigma
        return torch.stack([x, rate * (x - denoised)], dim=-1)

    def to_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self.rows().items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ScalarCorrection:
        take(dict(content), "the correction", {"c_x", "c_eps"}, set())
        return cls(content["c_x"], content["c_eps"])


@dataclass(frozen=True)
class ScalarStack:
    """Scalars [candidates, steps] of a batch [candidates * samples, ...], samples fastest."""

    c_x: torch.Tensor
    c_eps: torch.Tensor

    def __call__(self, step, x, denoised, mask=None):
        return precondition(
            x, denoised, _spread(self.c_x[:, step], x), _spread(self.c_eps[:, step], x), mask
        )

    def intermediate(self, step, x, denoised, mask=None):
        return precondition(x, denoised, 1.0, _spread(self.c_eps[:, step], x), mask)[1]


def linear_ramp(start: float, end: float, steps: int) -> tuple[float, ...]:
    """``steps`` values from ``start`` to ``end``; a single step takes ``start``."""
    if steps == 1:
        return (start,)
    return tuple(start + (end - start) * i / (steps - 1) for i in range(steps))


def _spread(column: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value a candidate [candidates] to one a sample, shaped to broadcast against x."""
    per_sample = column.to(x).repeat_interleave(x.shape[0] // len(column))
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))
