"""Where a noise level lies among those a schedule was learned at.

Coefficients belong to noise levels, not to step numbers: a partial denoise, a part of the steps or
another scheduler asks for them at sigmas of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from .solvers import log_snr

SIGMA_TOLERANCE = 1e-3  # relative: schedulers differ in the last digits between devices
_SNR_LIMIT = 12.0  # log-SNR is infinite at a flow's ends


@dataclass(frozen=True)
class Place:
    """``index`` of a learned step, and the ``share`` [0, 1] of the way to the next one.

    ``learned`` says that the sigma is that step's own (then ``share`` is 0).
    """

    index: int
    share: float = 0.0
    learned: bool = False

    def pick(self, values: Sequence[float]) -> float:
        """The coefficient here: never outside the two it lies between."""
        if not self.share:
            return values[self.index]
        low, high = values[self.index], values[self.index + 1]
        between = low + (high - low) * self.share
        return min(max(between, min(low, high)), max(low, high))


def places(sigmas: Sequence[float], learned: Sequence[float], flow: bool) -> list[Place]:
    """The place of each of ``sigmas`` among ``learned`` (decreasing, above 0).

    A sigma within a relative 1e-3 of learned ones is the nearest of them; any other lies between
    its neighbours in log-SNR, or is held at the first or last beyond the ends.
    """
    rising = [-value for value in learned]
    ratios = [_ratio(value, flow) for value in learned]
    return [_place(sigma, rising, ratios, flow) for sigma in sigmas]


def _place(sigma: float, rising: list[float], ratios: list[float], flow: bool) -> Place:
    after = bisect_left(rising, -sigma)  # the first learned sigma that is not above this one
    near = [i for i in (after - 1, after) if 0 <= i < len(rising)]
    nearest = min(near, key=lambda i: abs(sigma + rising[i]))
    if same(sigma, -rising[nearest]):
        return Place(nearest, learned=True)
    if len(near) == 1:
        return Place(nearest)
    low, high = ratios[after - 1], ratios[after]
    share = (_ratio(sigma, flow) - low) / (high - low) if high > low else 0.0
    return Place(after - 1, min(max(share, 0.0), 1.0))


def same(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, but for rounding."""
    return abs(sigma - other) <= SIGMA_TOLERANCE * max(sigma, other)


def _ratio(sigma: float, flow: bool) -> float:
    return min(max(log_snr(sigma, flow), -_SNR_LIMIT), _SNR_LIMIT)
