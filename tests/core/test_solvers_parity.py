"""Corrected trajectories against the published schedulers' own step equations.

Each scheduler is written here once more, in its own parametrisation (VP space and timesteps where
the publication has them), with Q-Sched as published: c_x on the sample and c_eps on the model's
output, before the scheduler's step.  Nothing but the ``sample_*`` under test is ours.
"""

from __future__ import annotations

import math

import pytest
import torch

from qsched_core.correction import ScalarCorrection
from qsched_core.solvers import (
    sample_ddim,
    sample_dpm_2m,
    sample_dpmpp_2m,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_lcm,
    sample_tcd,
)

C_X, C_EPS = (0.93, 0.97, 1.02, 1.04), (1.08, 0.99, 0.95, 1.03)
CORRECTION = ScalarCorrection(C_X, C_EPS)
# Stable Diffusion's "scaled linear" betas, as the schedulers build them
ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TRAINING = ((1 - ABAR) / ABAR).sqrt().float()
FLOW = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
# the "trailing" spacing, TCD's own, and one whose products with 0.7 fall on whole numbers
TIMESTEPS = [(999, 749, 499, 249), (999, 759, 499, 259), (980, 690, 390, 90)]


def eps_model(x_vp, t):
    """A noise prediction at an integer timestep, of a sample in VP space."""
    return torch.tanh(0.8 * x_vp + t / 1000) - 0.2 * x_vp


def velocity_model(x, sigma):
    return torch.tanh(0.8 * x + sigma) - 0.2 * x


def denoiser(x, sigma, **_):
    """eps_model as ComfyUI wraps one: x in sigma-space, D out."""
    t = (TRAINING.log() - sigma[0].log()).abs().argmin()
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x - sigma * eps_model(x / (1 + sigma**2).sqrt(), t)


def flow_denoiser(x, sigma, **_):
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x - sigma * velocity_model(x, sigma)


def noise(seed, shape=(2, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def replay():
    """The same noise for both sides, whatever the noise levels."""
    draws = iter(range(100, 200))
    return lambda *_: noise(next(draws))


def sigmas_at(timesteps, last=0.0):
    return torch.tensor([*(float(TRAINING[t]) for t in timesteps), last])


def close(got, expected):
    """1e-5 of the picture's own scale."""
    assert torch.isfinite(got).all()
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-5, f"relative error {error:.2e}"


def published(timesteps, step, x_vp):
    """Run ``step(i, t, t_prev, sample, eps)`` in VP space with the published correction."""
    for i, t in enumerate(timesteps):
        t_prev = timesteps[i + 1] if i + 1 < len(timesteps) else 0
        eps = eps_model(x_vp, t)
        x_vp = step(i, t, t_prev, C_X[i] * x_vp, C_EPS[i] * eps)
    return x_vp


def test_flow_match_euler():
    """FlowMatchEulerDiscreteScheduler: prev = sample + (sigma_next - sigma) * v."""
    expected = noise(0)
    for i in range(4):
        velocity = C_EPS[i] * velocity_model(expected, FLOW[i])
        expected = C_X[i] * expected + (FLOW[i + 1] - FLOW[i]) * velocity
    close(sample_euler(flow_denoiser, noise(0), FLOW, correction=CORRECTION), expected)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_euler_ancestral(timesteps):
    """EulerAncestralDiscreteScheduler: in sigma-space, the model sees sample / sqrt(sigma^2 + 1)."""
    sigmas = sigmas_at(timesteps).double()
    x = expected = noise(0) * float(sigmas[0])
    draw = replay()
    for i, t in enumerate(timesteps):
        sigma, to = float(sigmas[i]), float(sigmas[i + 1])
        eps = C_EPS[i] * eps_model(expected / math.sqrt(sigma**2 + 1), t)
        sample = C_X[i] * expected
        clean = sample - sigma * eps
        up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
        down = math.sqrt(to**2 - up**2)
        expected = sample + (sample - clean) / sigma * (down - sigma)
        expected = expected + (draw() * up if i < 3 else 0)
    got = sample_euler_ancestral(
        denoiser, x, sigmas.float(), correction=CORRECTION, noise_sampler=replay()
    )
    close(got, expected)


def tcd_step(gamma, draw):
    """TCDScheduler.step of an epsilon model, in VP space and integer timesteps."""

    def step(i, t, t_prev, sample, eps):
        s = int(torch.floor((1 - gamma) * torch.tensor(t_prev)))
        abar_t, abar_prev, abar_s = float(ABAR[t]), float(ABAR[t_prev]), float(ABAR[s])
        clean = (sample - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        noised = math.sqrt(abar_s) * clean + math.sqrt(1 - abar_s) * eps
        if gamma > 0 and i < 3:
            ratio = abar_prev / abar_s
            return math.sqrt(ratio) * noised + math.sqrt(1 - ratio) * draw()
        return noised

    return step


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_tcd_in_vp_space(gamma, timesteps):
    """From the same VP noise to the scheduler's end, timestep 0: x_vp = x * sqrt(alphabar)."""
    first = math.sqrt(float(ABAR[timesteps[0]]))
    expected = published(timesteps, tcd_step(gamma, replay()), noise(0))
    got = sample_tcd(
        denoiser,
        noise(0) / first,
        sigmas_at(timesteps, float(TRAINING[0])),
        correction=CORRECTION,
        training_sigmas=TRAINING,
        gamma=gamma,
        noise_sampler=replay(),
    )
    close(got * math.sqrt(float(ABAR[0])), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_tcd_to_sigma_0_is_the_schedulers_last_step(gamma, timesteps):
    """ComfyUI's sigmas end at 0: there the published scheduler's last sample is what comes out."""
    expected = published(timesteps, tcd_step(gamma, replay()), noise(0))
    first = math.sqrt(float(ABAR[timesteps[0]]))
    got = sample_tcd(
        denoiser,
        noise(0) / first,
        sigmas_at(timesteps),
        correction=CORRECTION,
        training_sigmas=TRAINING,
        gamma=gamma,
        noise_sampler=replay(),
    )
    close(got, expected)


def test_tcd_leaves_given_pixels_at_what_the_model_answers():
    """The scheduler's last sample is not quite clean; a pixel that was given stays as it was."""
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    given = noise(7)

    def masked(x, sigma, denoise_mask):
        return torch.lerp(given, denoiser(x, sigma), denoise_mask)

    got = sample_tcd(
        masked,
        noise(0) * float(TRAINING[999]),
        sigmas_at(TIMESTEPS[0]),
        {"denoise_mask": mask},
        correction=CORRECTION,
        training_sigmas=TRAINING,
        noise_sampler=replay(),
    )
    assert torch.equal(got[..., :4], given[..., :4])
    assert not torch.allclose(got[..., 4:], given[..., 4:], atol=0.1)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_analogue_of_tcd_for_flow(gamma):
    """Signal 1 - sigma, noise sigma, s = (1 - gamma) * t: down to s, then noise up to t."""
    expected, draw = noise(0), replay()
    for i in range(4):
        t, t_next = float(FLOW[i]), float(FLOW[i + 1])
        sample = C_X[i] * expected
        velocity = C_EPS[i] * velocity_model(expected, t)
        clean, eps = sample - t * velocity, sample + (1 - t) * velocity
        s = (1 - gamma) * t_next
        noised = (1 - s) * clean + s * eps
        ratio = (1 - t_next) / (1 - s)
        fresh = draw() if gamma > 0 and t_next > 0 else 0
        expected = ratio * noised + math.sqrt(max(t_next**2 - (ratio * s) ** 2, 0)) * fresh
    got = sample_tcd(
        flow_denoiser,
        noise(0),
        FLOW,
        correction=CORRECTION,
        flow=True,
        gamma=gamma,
        noise_sampler=replay(),
    )
    close(got, expected)


def test_tcd_keeps_the_pictures_energy():
    """Unit variance in VP space stays so, under the consistency function of unit Gaussian data.

    The mistakes that give black pictures (gamma in the wrong space, a target above the level it
    returns to) change the variance.
    """

    def consistency(x, sigma, **_):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()

    sigmas = sigmas_at(TIMESTEPS[0], float(TRAINING[100]))
    x = noise(0, (4, 4, 64, 64)) * (1 + sigmas[0] ** 2).sqrt()
    got = sample_tcd(consistency, x, sigmas, {"seed": 3}, training_sigmas=TRAINING, gamma=1.0)
    assert (got / (1 + sigmas[-1] ** 2).sqrt()).std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_ddim_in_vp_space(eta, timesteps):
    """DDIM, eq. 12 with eq. 16's sigma, between integer timesteps."""
    draw = replay()

    def step(i, t, t_prev, sample, eps):
        abar_t, abar_prev = float(ABAR[t]), float(ABAR[t_prev])
        clean = (sample - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_prev)
        direction = math.sqrt(1 - abar_prev - sigma**2) * eps
        return math.sqrt(abar_prev) * clean + direction + (sigma * draw() if eta else 0)

    got = sample_ddim(
        denoiser,
        noise(0) / math.sqrt(float(ABAR[timesteps[0]])),
        sigmas_at(timesteps, float(TRAINING[0])),
        correction=CORRECTION,
        eta=eta,
        noise_sampler=replay(),
    )
    close(got * math.sqrt(float(ABAR[0])), published(timesteps, step, noise(0)))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_of_a_flow_is_ddim_of_its_rescaled_chain(eta):
    """x / (1 - t) of a flow is a sigma-space chain at t / (1 - t): eq. 12 and 16 are applied there.

    Eq. 16 in sigma-space is up = eta * to * sqrt(1 - (to / sigma)^2)."""
    times = torch.tensor([0.95, 0.9, 0.75, 0.5, 0.1])
    expected, draw = noise(0), replay()
    for i in range(4):
        t, t_next = float(times[i]), float(times[i + 1])
        sigma, to = t / (1 - t), t_next / (1 - t_next)
        sample = C_X[i] * expected
        velocity = C_EPS[i] * velocity_model(expected, t)
        clean, eps = sample - t * velocity, sample + (1 - t) * velocity
        up = eta * to * math.sqrt(1 - (to / sigma) ** 2)
        chain = clean + math.sqrt(to**2 - up**2) * eps + (up * draw() if eta else 0)
        expected = (1 - t_next) * chain
    got = sample_ddim(
        flow_denoiser,
        noise(0),
        times,
        correction=CORRECTION,
        flow=True,
        eta=eta,
        noise_sampler=replay(),
    )
    close(got, expected)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_lcm_in_vp_space(timesteps):
    """LCM: x_prev = sqrt(abar_prev) * x0 + sqrt(1 - abar_prev) * noise, x0 at the last step."""
    draw = replay()

    def step(i, t, t_prev, sample, eps):
        abar_t, abar_prev = float(ABAR[t]), float(ABAR[t_prev])
        clean = (sample - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        return math.sqrt(abar_prev) * clean + math.sqrt(1 - abar_prev) * draw() if i < 3 else clean

    got = sample_lcm(
        denoiser,
        noise(0) / math.sqrt(float(ABAR[timesteps[0]])),
        sigmas_at(timesteps),
        correction=CORRECTION,
        noise_sampler=replay(),
    )
    close(got, published(timesteps, step, noise(0)))


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_dpm_solver_2m_in_vp_space(timesteps):
    """DPM-Solver++(2M): alpha, sigma and lambda of VP space; first order at either end.

    x_t = (sigma_t / sigma_s) x_s - alpha_t (exp(-h) - 1) D, D from the *corrected* x0 of two steps.
    """
    alpha, sigma = ABAR.sqrt().tolist(), (1 - ABAR).sqrt().tolist()
    level = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    history = []

    def step(i, t, t_prev, sample, eps):
        clean = (sample - sigma[t] * eps) / alpha[t]
        history.append(clean)
        if i == 3:  # lower_order_final, to sigma 0
            return clean
        h = level[t_prev] - level[t]
        mixed = clean
        if i:
            r = (level[t] - level[timesteps[i - 1]]) / h
            mixed = clean + (clean - history[-2]) / (2 * r)
        return sigma[t_prev] / sigma[t] * sample - alpha[t_prev] * math.expm1(-h) * mixed

    got = sample_dpmpp_2m(
        denoiser,
        noise(0) / math.sqrt(float(ABAR[timesteps[0]])),
        sigmas_at(timesteps),
        correction=CORRECTION,
    )
    close(got, published(timesteps, step, noise(0)))


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_dpm_solver_2m_of_the_noise_in_vp_space(timesteps):
    """DPM-Solver(2M), noise prediction: x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(h) - 1) eps.

    eps is extrapolated from the *corrected* noise of two steps.
    """
    alpha, sigma = ABAR.sqrt().tolist(), (1 - ABAR).sqrt().tolist()
    level = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    history = []

    def step(i, t, t_prev, sample, eps):
        history.append(eps)
        if i == 3:  # lower_order_final, to sigma 0
            return (sample - sigma[t] * eps) / alpha[t]
        h = level[t_prev] - level[t]
        mixed = eps
        if i:
            r = (level[t] - level[timesteps[i - 1]]) / h
            mixed = eps + (eps - history[-2]) / (2 * r)
        return alpha[t_prev] / alpha[t] * sample - sigma[t_prev] * math.expm1(h) * mixed

    got = sample_dpm_2m(
        denoiser,
        noise(0) / math.sqrt(float(ABAR[timesteps[0]])),
        sigmas_at(timesteps),
        correction=CORRECTION,
    )
    close(got, published(timesteps, step, noise(0)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_sde_corrects_both_evaluations(eta):
    """Two stages in sigma-space: c_x scales the state once, c_eps corrects both outputs."""
    sigmas = sigmas_at(TIMESTEPS[0])
    x = expected = noise(0) * float(sigmas[0])
    draw = replay()
    ones = torch.ones(2)

    def noisy(sigma, to):
        up = eta * to * math.sqrt(1 - (to / sigma) ** 2)
        return math.sqrt(to**2 - up**2), up

    for i in range(4):
        sigma, to = float(sigmas[i]), float(sigmas[i + 1])
        state = C_X[i] * expected
        clean = state - C_EPS[i] * (expected - denoiser(expected, sigma * ones))
        if not to:
            expected = clean
            continue
        middle = math.sqrt(sigma * to)  # half way in log sigma
        down, up = noisy(sigma, middle)
        inner = down / sigma * state + (1 - down / sigma) * clean
        inner = inner + (draw() * up if eta else 0)
        second = inner - C_EPS[i] * (inner - denoiser(inner, middle * ones))
        down, up = noisy(sigma, to)
        expected = down / sigma * state + (1 - down / sigma) * second
        expected = expected + (draw() * up if eta else 0)
    got = sample_dpmpp_sde(
        denoiser, x, sigmas, correction=CORRECTION, eta=eta, noise_sampler=replay()
    )
    close(got, expected)
