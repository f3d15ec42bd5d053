"""The Frechet distance between two sets of images, in the features of an encoder.

Of two Gaussians (Dowson and Landau, 1982; FID: Heusel et al., arXiv 1706.08500, equation 6):

    d = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

With C = A^T A of the centred features A [n, dim] divided by sqrt(n - 1), the last trace is the sum of
the singular values of A1 A2^T, which takes no square root of a matrix: it is exact and stable where
a covariance is singular, as it always is with fewer images than dimensions.
"""

from __future__ import annotations

import torch
from scipy.stats import t as student

from ..search.guard import LEVEL, Interval

FEW_PER_DIMENSION = 1.0  # images a dimension below which a covariance is singular
GROUPS, FEWEST, MOST = 20, 6, 1024  # of the jackknife; images it is made for


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Frechet distance of feature sets [n, dim] and [m, dim], in float64; 0 for equal sets.

    A finite sample's distance is biased upward, the more so the fewer images there are (Chong and
    Forsyth, arXiv 1911.07023): compare distances at equal numbers of images only.  ValueError for
    fewer than 2 images, for features of another length, and for those that are not finite.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"the {name} set has shape {list(features.shape)}; [n, dim] with n of at least 2 is "
                "needed"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"the {name} set has features that are NaN or infinite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"the sets have features of length {first.shape[1]} and {second.shape[1]}; encode both "
            "with the same encoder"
        )
    (mean1, root1), (mean2, root2) = _moments(first), _moments(second)
    shift = (mean1 - mean2).square().sum()
    spread = root1.square().sum() + root2.square().sum()
    common = torch.linalg.svdvals(root1 @ root2.T).sum()
    return max(0.0, float(shift + spread - 2 * common))  # rounding may leave it just below 0


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


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [dim], and a matrix R [min(n, dim), dim] whose R^T R is the covariance."""
    x = features.detach().cpu().double()
    mean = x.mean(0)
    root = (x - mean) / (len(x) - 1) ** 0.5
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return mean, root


def few_images(count: int, dimensions: int) -> str:
    """What to say of a distance from ``count`` images; empty where there are enough."""
    if count > dimensions * FEW_PER_DIMENSION:
        return ""
    return (
        f"{count} images are few for features of {dimensions} dimensions (their covariance is "
        "singular), so the distance is biased upward: compare it between these arms, not with "
        "values published for more images"
    )
