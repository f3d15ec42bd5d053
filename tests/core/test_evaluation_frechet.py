"""The Frechet distance: the published formula's numbers, and what must hold of any distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from qsched_core.evaluation.frechet import few_images, frechet_difference, frechet_distance


def published(a, b) -> float:
    """The formula as it stands, with scipy's square root of a matrix."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = sqrtm(c1 @ c2)
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(root)))


def features(seed, n, dim, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


@pytest.mark.parametrize("n,m,dim", [(200, 300, 8), (60, 40, 32), (500, 33, 24), (90, 90, 64)])
def test_it_is_the_published_formula(n, m, dim):
    a, b = features(n, n, dim), features(m + 1, m, dim, 0.7)
    ours = frechet_distance(torch.tensor(a), torch.tensor(b))
    assert ours == pytest.approx(published(a, b), rel=1e-8)


def test_singular_covariances_need_no_help():
    """With fewer images than dimensions: the formula's limit as its ridge goes to 0."""
    a, b = features(0, 12, 40), features(1, 9, 40)
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    ridge = 1e-9 * np.eye(40)
    root = np.real(sqrtm((c1 + ridge) @ (c2 + ridge)))
    limit = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(limit, rel=1e-4)


sets = st.tuples(st.integers(0, 999), st.integers(2, 30), st.integers(1, 20))


@settings(deadline=None, max_examples=60)
@given(sets, st.integers(2, 30), st.floats(-3, 3))
def test_identities(case, m, shift):
    seed, n, dim = case
    a, b = (torch.tensor(features(s, k, dim)) for s, k in ((seed, n), (seed + 1, m)))
    size = float(a.var(0).sum() + b.var(0).sum() + (a.mean(0) - b.mean(0)).square().sum())
    near = {"abs": 1e-9 * (1 + size)}
    assert frechet_distance(a, a) == pytest.approx(0, **near)
    assert frechet_distance(a, a[torch.randperm(n)]) == pytest.approx(0, **near)
    assert frechet_distance(a, a + shift) == pytest.approx(dim * shift**2, rel=1e-6, **near)
    both = frechet_distance(a, b)
    assert both == pytest.approx(frechet_distance(b, a), **near)
    assert both >= float((a.mean(0) - b.mean(0)).square().sum()) - 1e-9 * (1 + size)
    turn = torch.linalg.qr(torch.tensor(features(seed + 2, dim, dim))).Q
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(both, **near)
    scaled = frechet_distance(a - a.mean(0), 3 * (a - a.mean(0)))
    assert scaled == pytest.approx(4 * float(a.var(0).sum()), rel=1e-6, **near)


def test_float32_features_lose_nothing():
    a = torch.tensor(features(5, 50, 16)).float() + 100  # far from 0: squares would cancel
    assert frechet_distance(a, a + 0.5) == pytest.approx(16 * 0.25, rel=1e-3)
    assert frechet_distance(a, a) < 1e-9


def test_the_bias_of_few_images_is_upward_and_said():
    big = torch.tensor(np.random.default_rng(0).normal(size=(2, 4000, 32)))
    few = frechet_distance(big[0, :40], big[1, :40])
    many = frechet_distance(big[0], big[1])
    assert few > 10 * many
    assert "biased upward" in few_images(32, 32) and few_images(33, 32) == ""


def arms(rng, n, dim, weaker):
    """A reference set, and two that differ from it by the same error, ``weaker`` in the second."""
    base = torch.tensor(rng.normal(size=(n, dim)) * np.linspace(2, 0.1, dim))
    error = torch.tensor(rng.normal(size=(n, dim)) * 0.5)
    own = torch.tensor(rng.normal(size=(2, n, dim)) * 0.3)
    return base + error + own[0], base + weaker * error + own[1], base


@pytest.mark.parametrize("n", [12, 48])
@pytest.mark.parametrize("paired", [True, False])
def test_a_change_of_the_distance_is_told_from_chance(n, paired):
    rng, false, true = np.random.default_rng(n), 0, 0
    for _ in range(60):
        same = frechet_difference(*arms(rng, n, 24, 1.0), paired)
        false += not same.low <= 0 <= same.high
        true += frechet_difference(*arms(rng, n, 24, 0.3), paired).high < 0
    assert false <= 8  # 3 are expected; more than 8 have a chance of 1 in 100
    assert true >= (50 if n == 48 else 20)


def test_a_change_is_the_difference_and_turns_with_it():
    before, after, base = arms(np.random.default_rng(1), 30, 8, 0.5)
    change = frechet_difference(before, after, base, True)
    exact = frechet_distance(after, base) - frechet_distance(before, base)
    assert change.mean == pytest.approx(exact) and change.n == 30
    back = frechet_difference(after, before, base, True)
    assert (back.mean, back.low, back.high) == pytest.approx((-exact, -change.high, -change.low))
    nothing = frechet_difference(after, after, base, True)
    assert nothing.low == nothing.high == 0
    assert frechet_difference(before[:5], after[:5], base[:5], True) is None


@pytest.mark.parametrize(
    "a,b,reason",
    [
        ((1, 4), (5, 4), "first set has 1 features"),
        ((5, 4), (5,), "second set has shape"),
        ((5, 4), (5, 3), "length 4 and 3"),
    ],
)
def test_sets_that_have_no_distance_are_named(a, b, reason):
    with pytest.raises(ValueError, match=reason):
        frechet_distance(torch.ones(a), torch.ones(b))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.full((3, 2), float("nan")), torch.ones(3, 2))
