"""Intervals: how sure a mean is, and a paired gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of n paired gains with the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] on {self.n} prompts"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """95 % interval of the mean of ``after - before``, one score a prompt in each.

    Student's interval, corrected for skewness: all means that Johnson's modified t test (JASA 73,
    1978, "Modified t tests and confidence intervals for asymmetrical populations") does not reject.
    It is needed where a few prompts lose far more than the others gain: there Student's interval and
    the percentile bootstrap lie above 0 much more often than by their nominal error.  ValueError when lengths differ
    or are below 2.
    """
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    n = len(gains)
    if len(before) != len(after) or n < 2:
        raise ValueError(
            f"{len(before)} scores before and {len(after)} after; give the same number, at least 2"
        )
    mean, spread = float(gains.mean()), float(gains.std())
    if not spread:
        return Interval(mean, mean, mean, n)
    skewness = float((((gains - mean) / spread) ** 3).mean())
    # the estimate without bias for few normal samples; two values have no skewness
    skewness = skewness * math.sqrt(n * (n - 1)) / (n - 2) if n > 2 else 0.0
    error = spread / math.sqrt(n - 1)
    low = mean - error * _johnson_quantile(skewness, n)
    high = mean + error * _johnson_quantile(-skewness, n)
    return Interval(mean, low, high, n)


def mean_interval(values: Sequence[float]) -> Interval:
    """Interval of the mean of ``values``, as :func:`paired_interval`; for one value it has no width."""
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]), float(values[0]), 1)
    return paired_interval([0.0] * len(values), values)


def _johnson_quantile(skewness: float, n: int) -> float:
    """Standard errors from the mean of n values to the lower end of its interval.

    It is the t that solves t + A t^2 + A / 2 = q, with A = skewness / (3 sqrt(n)) and q Student's
    quantile.  With a long left tail (A < 0) there may be no solution.  Then t is the largest that any
    solvable A gives, about 2 q.
    """
    from scipy.special import stdtrit

    bend = skewness / (3 * math.sqrt(n))
    rest = float(stdtrit(n - 1, (1 + LEVEL) / 2)) - bend / 2
    return 2 * rest / (1 + math.sqrt(max(0.0, 1 + 4 * bend * rest)))
