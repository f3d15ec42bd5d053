"""Noise levels: checks of a trajectory's, and where a level lies among the learned ones.

Corrections belong to noise levels, not to step numbers: a partial denoise, a part of the steps or
another scheduler asks for them at sigmas of its own.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .validation import MAX_STEPS, ScheduleError

SIGMA_TOLERANCE = 1e-3  # relative; between devices a scheduler's last digits differ
_SNR_LIMIT = 12.0  # log-SNR is infinite at a flow's ends


def check_falling(sigmas: Sequence[float]) -> None:
    """ScheduleError unless there is a step, and sigma falls at every one and not below 0."""
    if not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise ScheduleError(
            f"sigmas has {len(sigmas)} values; give 2 to {MAX_STEPS + 1}, one more than steps"
        )
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        if not after < sigma:  # also where either is NaN
            raise ScheduleError(
                f"sigmas must decrease at every step; sigmas[{i + 1}]={after:.6g} does not "
                f"fall below sigmas[{i}]={sigma:.6g}"
            )
    if sigmas[-1] < 0:
        raise ScheduleError(f"sigmas ends at {sigmas[-1]:.6g}; it may not fall below 0")


def log_snr(sigma: float, flow: bool) -> float:
    """Half the log signal-to-noise ratio at noise level ``sigma``; infinite at its ends."""
    if sigma <= 0:
        return math.inf
    if not flow:
        return -math.log(sigma)
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)


def divided(sigmas: Sequence[float], steps: int, flow: bool) -> tuple[float, ...]:
    """``steps`` + 1 levels from the first of ``sigmas`` to the last, evenly between each two of them.

    Evenly in sigma for a flow, else in sigma^(1/7) (Karras et al. 2022, arXiv 2206.00364, eq. 5).
    """
    power = 1 if flow else 7
    even = [sigma ** (1 / power) for sigma in sigmas]
    found = []
    for k in range(steps + 1):
        whole, share = divmod(k * (len(sigmas) - 1), steps)
        if share == 0:
            found.append(sigmas[whole])
        else:
            low, high = even[whole], even[whole + 1]
            found.append((low + (high - low) * share / steps) ** power)
    return tuple(found)


def sigma_of(log_snr: float, flow: bool) -> float:
    """The noise level at half the log signal-to-noise ratio: the inverse of :func:`log_snr`."""
    return 1 / (1 + math.exp(log_snr)) if flow else math.exp(-log_snr)


@dataclass(frozen=True)
class SigmaMatch:
    """A noise level among the learned ones: ``index`` of a learned step, and the ``share`` [0, 1] of
    the way to the next one.

    ``learned`` says that the sigma is that step's own (then ``share`` is 0).
    """

    index: int
    share: float = 0.0
    learned: bool = False

    def pick(self, values: Sequence[float]) -> float:
        """The value here, interpolated: never outside its two neighbours."""
        if not self.share:
            return values[self.index]
        low, high = values[self.index], values[self.index + 1]
        between = low + (high - low) * self.share
        return min(max(between, min(low, high)), max(low, high))


def match_sigmas(sigmas: Sequence[float], learned: Sequence[float], flow: bool) -> list[SigmaMatch]:
    """Where each of ``sigmas`` lies among ``learned`` (decreasing, above 0).

    A sigma within a relative 1e-3 of learned ones is the nearest of them; any other lies between
    its neighbours in log-SNR, or is held at the first or last beyond the ends.
    """
    rising = [-value for value in learned]
    ratios = [_ratio(value, flow) for value in learned]
    return [_match(sigma, rising, ratios, flow) for sigma in sigmas]


def _match(sigma: float, rising: list[float], ratios: list[float], flow: bool) -> SigmaMatch:
    after = bisect_left(rising, -sigma)  # the first learned sigma that is not above this one
    near = [i for i in (after - 1, after) if 0 <= i < len(rising)]
    nearest = min(near, key=lambda i: abs(sigma + rising[i]))
    if same(sigma, -rising[nearest]):
        return SigmaMatch(nearest, learned=True)
    if len(near) == 1:
        return SigmaMatch(nearest)
    low, high = ratios[after - 1], ratios[after]
    share = (_ratio(sigma, flow) - low) / (high - low) if high > low else 0.0
    return SigmaMatch(after - 1, min(max(share, 0.0), 1.0))


def same(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, but for rounding."""
    return abs(sigma - other) <= SIGMA_TOLERANCE * max(sigma, other)


def _ratio(sigma: float, flow: bool) -> float:
    return min(max(log_snr(sigma, flow), -_SNR_LIMIT), _SNR_LIMIT)
