"""The corrected solvers against their published equations, and the correction's identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.precondition import BatchCorrection, ScalarCorrection, precondition
from qsched_core.rollout import rollout
from qsched_core.solvers import SOLVERS, get_solver, sample_euler, sample_euler_ancestral

FLOW = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
VE = torch.tensor([14.6146, 3.5, 1.2, 0.4, 0.0])
CORRECTION = ScalarCorrection((0.93, 0.97, 1.02, 1.04), (1.08, 0.99, 0.95, 1.03))
scalars = st.floats(0.5, 2.0)


def model(x, sigma, **_):
    """A denoiser that depends on the latent and the noise level, nonlinearly."""
    return torch.tanh(x * 0.7) / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)))


def noise(seed=0, shape=(2, 4, 6, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(scalars, scalars, st.floats(0.01, 20))
def test_precondition_is_the_published_pair(c_x, c_eps, sigma):
    x, denoised = noise(1), noise(2)
    eps = (x - denoised) / sigma
    scaled, corrected = precondition(x, denoised, c_x, c_eps)
    torch.testing.assert_close(scaled, c_x * x)
    torch.testing.assert_close(corrected, c_x * x - sigma * c_eps * eps)


@given(scalars, scalars)
def test_known_pixels_are_untouched_for_any_coefficients(c_x, c_eps):
    x, denoised = noise(1), noise(2)
    mask = torch.zeros(1, 1, 6, 6, dtype=x.dtype)
    mask[..., :3] = 1
    scaled, corrected = precondition(x, denoised, c_x, c_eps, mask)
    assert torch.equal(scaled[..., 3:], x[..., 3:])
    assert torch.equal(corrected[..., 3:], denoised[..., 3:])
    full = precondition(x, denoised, c_x, c_eps)
    torch.testing.assert_close(scaled[..., :3], full[0][..., :3])
    torch.testing.assert_close(corrected[..., :3], full[1][..., :3])


def test_flow_match_euler_of_the_publication():
    """FlowMatchEulerDiscreteScheduler: prev = c_x x + (sigma_next - sigma) c_eps v."""
    x = expected = noise()
    ones = torch.ones(2, dtype=x.dtype)
    for i in range(4):
        velocity = (expected - model(expected, FLOW[i] * ones)) / FLOW[i]
        expected = (
            CORRECTION.c_x[i] * expected + (FLOW[i + 1] - FLOW[i]) * CORRECTION.c_eps[i] * velocity
        )
    got = sample_euler(model, x, FLOW, correction=CORRECTION)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_euler_ancestral_of_the_publication():
    """EulerAncestralDiscreteScheduler: the coefficients scale sample and model output, then
    x0 = x' - sigma eps', derivative = (x' - x0) / sigma, and fresh noise is added."""
    x = expected = noise()
    ones = torch.ones(2, dtype=x.dtype)
    fresh = [noise(10 + i) for i in range(4)]
    for i in range(4):
        sigma, following = VE[i], VE[i + 1]
        eps = CORRECTION.c_eps[i] * (expected - model(expected, sigma * ones)) / sigma
        sample = CORRECTION.c_x[i] * expected
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        clean = sample - sigma * eps
        expected = sample + (sample - clean) / sigma * (down - sigma) + up * fresh[i]
    draws = iter(fresh)
    got = sample_euler_ancestral(
        model, x, VE, correction=CORRECTION, noise_sampler=lambda *_: next(draws)
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_coefficients_of_one_are_the_base_solver_bit_for_bit(name, sigmas, flow):
    solver = get_solver(name)
    args = {"extra_args": {"seed": 7}} | solver.options(flow)

    def seeded(x, sigma, seed):
        return model(x, sigma)

    base = solver.function(seeded, noise(), sigmas, **args)
    ones = ScalarCorrection((1.0,) * 4, (1.0,) * 4)
    assert torch.equal(solver.function(seeded, noise(), sigmas, correction=ones, **args), base)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_a_batched_rollout_equals_each_trajectory_alone(name, sigmas, flow):
    x, seeds = noise(shape=(3, 4, 6, 6)), (5, 6, 7)
    candidates = [CORRECTION, ScalarCorrection((1.0,) * 4, (1.0,) * 4)]
    many = rollout(model, x, sigmas, candidates, solver=name, flow=flow, seeds=seeds)
    assert many.latents.shape == (2, 3, 4, 6, 6)
    assert many.evaluations == 3 + 2 * 3 * 3  # the first step once, then every candidate
    solver = get_solver(name)
    for k, candidate in enumerate(candidates):
        for p, seed in enumerate(seeds):
            alone = solver.function(
                lambda x, sigma, seed: model(x, sigma),
                x[p : p + 1],
                sigmas,
                extra_args={"seed": seed},
                correction=candidate,
                **solver.options(flow),
            )
            torch.testing.assert_close(many.latents[k, p : p + 1], alone, rtol=1e-6, atol=1e-6)
    again = rollout(
        model, x, sigmas, candidates, solver=name, flow=flow, seeds=seeds, first=many.first
    )
    assert again.evaluations == 2 * 3 * 3
    assert torch.equal(again.latents, many.latents)


def test_a_batch_correction_gives_each_candidate_its_own_scalars():
    x, denoised = noise(1, (4, 1, 2, 2)), noise(2, (4, 1, 2, 2))
    batch = BatchCorrection.of([ScalarCorrection((0.9,), (1.1,)), ScalarCorrection((1.2,), (0.7,))])
    scaled, corrected = batch(0, x, denoised)
    for rows, (c_x, c_eps) in ((slice(0, 2), (0.9, 1.1)), (slice(2, 4), (1.2, 0.7))):
        want = precondition(x[rows], denoised[rows], c_x, c_eps)
        torch.testing.assert_close(scaled[rows], want[0])
        torch.testing.assert_close(corrected[rows], want[1])


def test_a_broken_model_stops_with_the_step():
    def broken(x, sigma, **_):
        return model(x, sigma) if sigma[0] > 0.8 else x * torch.nan

    with pytest.raises(ValueError, match="step 3 of 4"):
        sample_euler(broken, noise(), FLOW)


def test_an_unknown_solver_lists_the_known():
    with pytest.raises(ValueError, match="euler_ancestral"):
        get_solver("heun")
