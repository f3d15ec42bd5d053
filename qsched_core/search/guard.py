"""Does it help?  A paired bootstrap interval over prompts, and the guard that acts on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
BLOCK = 2**20  # draws held at a time: 16 MB with their values
LEVEL = 0.95
MIN_PROMPTS = 6  # below, even the smallest of all resampled means is above 0 too often by chance


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


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Bootstrap interval of the mean of ``after - before``, resampling prompts.

    The expanded percentile interval (Hesterberg, "What teachers should know about the bootstrap",
    arXiv 1411.5279, section 5.3): percentiles widened so that for normal data the interval is as
    wide as Student's t, which matters below some thirty prompts.  A pure function of its arguments.
    Raises ValueError when lengths differ or are below 2.
    """
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    n = len(gains)
    if len(before) != len(after) or n < 2:
        raise ValueError(
            f"{len(before)} scores before and {len(after)} after; give the same number, at least 2"
        )
    means = resampled(gains, lambda rows: rows.mean(axis=1), resamples, seed)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student_quantile((1 + level) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(gains.mean()), float(low), float(high), n)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of ``values``, as :func:`paired_interval`; one has no width."""
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]), float(values[0]), 1)
    return paired_interval([0.0] * len(values), values, seed)


def resampled(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> np.ndarray:
    """``statistic`` of ``resamples`` bootstrap resamples of ``values`` [n], in bounded memory.

    ``statistic`` takes resamples as rows [m, n] and gives [m] or [m, k].  The same seed gives the
    same resamples, however many fit into a block.
    """
    rng, n = np.random.default_rng(seed), len(values)
    rows = max(1, BLOCK // n)
    blocks = (min(rows, resamples - start) for start in range(0, resamples, rows))
    return np.concatenate([statistic(values[rng.integers(n, size=(m, n))]) for m in blocks])


def _student_quantile(p: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(p, freedom))


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "helps", "no effect" or "overfitted"; ``text`` gives the numbers."""

    kind: str
    text: str
    keep_identity: bool


def judge(calibration: Interval | None, heldout: Interval | None, guard: bool) -> Verdict:
    """Compare the gains of the search's best candidate over c = 1 on its own and on held-out prompts.

    None means that nothing beat c = 1 in the search.  With ``guard`` the schedule stays at 1 unless
    the held-out interval lies above 0.
    """
    if calibration is None or heldout is None:
        text = "no effect: no candidate scored above c = 1 on the calibration prompts; c stays at 1"
        return Verdict("no effect", text, True)
    numbers = f"held-out gain {heldout}; calibration gain {calibration}"
    enough = heldout.n >= MIN_PROMPTS
    if heldout.low > 0 and enough:
        return Verdict("helps", f"helps: {numbers}", False)
    if not enough:
        kind = "no effect"
        reason = f"{heldout.n} held-out prompts are too few to tell; give at least {MIN_PROMPTS}"
    elif calibration.low > 0:
        kind = "overfitted"
        reason = "the gain on the searched prompts does not carry over to prompts it never saw"
    else:
        kind, reason = "no effect", "the gain can't be told from chance"
    action = (
        "the guard keeps c = 1"
        if guard
        else "the guard is off, so the coefficients are returned all the same"
    )
    return Verdict(kind, f"{kind}: {reason} ({numbers}); {action}", guard)
