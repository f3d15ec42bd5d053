"""The Frechet distance between two sets of images, in the features of an encoder.

Of two Gaussians (Dowson and Landau, 1982; FID: Heusel et al., arXiv 1706.08500, equation 6):

    d = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

With C = A^T A of the centred features A [n, dim] divided by sqrt(n - 1), the last trace is the sum of
the singular values of A1 A2^T, which takes no square root of a matrix: it is exact and stable where
a covariance is singular, as it always is with fewer images than dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.stats import t as student

from ..statistics import LEVEL, Interval

FEW_PER_DIMENSION = 1.0  # images for each dimension; with fewer the covariance is singular
# of the jackknife, and the numbers of images for which it is computed
GROUPS, FEWEST, MOST = 20, 6, 1024


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Frechet distance of feature sets [n, dim] and [m, dim], in float64; 0 for equal sets.

    A finite sample's distance is biased upward, the more so the fewer images there are (Chong and
    Forsyth, arXiv 1911.07023): compare distances at equal numbers of images only.  ValueError for
    fewer than 2 images, for features of another length, and for those that are not finite.
    """
    return moments([first], "the first set").distance(moments([second], "the second set"))


@dataclass(frozen=True)
class Moments:
    """The Gaussian fitted to ``count`` features: mean [dim], and R [m, dim] with m at most dim.

    The covariance is R^T R.
    """

    count: int
    mean: torch.Tensor
    root: torch.Tensor

    @property
    def dim(self) -> int:
        return len(self.mean)

    def distance(self, other: Moments) -> float:
        """Squared Frechet distance; ValueError for features of another length."""
        if self.dim != other.dim:
            raise ValueError(
                f"the sets have features of length {self.dim} and {other.dim}; encode both with the "
                "same encoder"
            )
        shift = (self.mean - other.mean).square().sum()
        spread = self.root.square().sum() + other.root.square().sum()
        common = torch.linalg.svdvals(self.root @ other.root.T).sum()
        return max(0.0, float(shift + spread - 2 * common))  # rounding may leave it just below 0


def moments(blocks: Iterable[torch.Tensor], name: str = "the set") -> Moments:
    """Moments, in float64, of features that come in blocks [m, dim]; one block is in memory at a time.

    Blocks are joined as in Chan, Golub and LeVeque (1979): the scatter of a union is the sum of both
    scatters and of the scatter between the two means.  ValueError for fewer than 2 features, and for
    those that are not finite.
    """
    count, mean, scatter = 0, torch.zeros(()), None
    for block in blocks:
        if block.ndim != 2:
            raise ValueError(f"{name} has shape {list(block.shape)}; [n, dim] is needed")
        if not torch.isfinite(block).all():
            raise ValueError(f"{name} has features that are NaN or infinite")
        x = block.detach().cpu().double()
        own = x.mean(0)
        rows, total = x - own, count + len(x)
        if scatter is not None:
            between = (own - mean) * (count * len(x) / total) ** 0.5
            rows = torch.cat([scatter, rows, between[None]])
            own = mean + (own - mean) * (len(x) / total)
        count, mean = total, own
        scatter = torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
    if count < 2:
        raise ValueError(f"{name} has {count} features; [n, dim] with n of at least 2 is needed")
    return Moments(count, mean, scatter / (count - 1) ** 0.5)


def frechet_difference(
    before: torch.Tensor, after: torch.Tensor, reference: torch.Tensor, paired: bool
) -> Interval | None:
    """How much farther ``after`` is from ``reference`` than ``before``, with a 95 % interval.

    ``before`` and ``after`` [n, dim] have the same prompts, ``reference`` too if ``paired``.  The
    delete-a-group jackknife (Kott, Journal of Official Statistics 17, 2001) over prompts; the bias of
    few images, which both distances have, largely cancels.  None for less than 6 images, and for
    more than 1024, where it would take long.
    """
    n = len(before)
    if not FEWEST <= n <= MOST:
        return None

    def difference(kept) -> float:
        other = reference[kept] if paired else reference
        return frechet_distance(after[kept], other) - frechet_distance(before[kept], other)

    groups = min(GROUPS, n)
    member = torch.arange(n) % groups
    whole = difference(member >= 0)
    left = torch.tensor([difference(member != k) for k in range(groups)], dtype=torch.float64)
    error = float(((groups - 1) / groups * (left - left.mean()).square().sum()).sqrt())
    reach = float(student.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return Interval(whole, whole - reach, whole + reach, n)


def few_images(count: int, dimensions: int) -> str:
    """What to say of a distance from ``count`` images; empty where there are enough."""
    if count > dimensions * FEW_PER_DIMENSION:
        return ""
    return (
        f"{count} images are few for features of {dimensions} dimensions (their covariance is "
        "singular), so the distance is biased upward: compare it between these arms, not with "
        "values published for more images"
    )
