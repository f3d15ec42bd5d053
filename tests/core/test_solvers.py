"""The corrected solvers against their published equations, and the correction's identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.correction import ScalarCorrection
from qsched_core.correction.scalar import precondition
from qsched_core.solvers import SOLVERS, ModelInfo, get_solver, sample_euler, sample_steps
from qsched_core.solvers.tcd import target_sigma, timestep_of
from qsched_core.trajectory import (
    Candidate,
    EvaluationMemo,
    StepSolver,
    Trajectory,
    by_trajectory,
    rollout,
)

FLOW = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
VE = torch.tensor([14.6146, 3.5, 1.2, 0.4, 0.0])
TRAINING = ((torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).neg() + 1).cumprod(0)
TRAINING = ((1 - TRAINING) / TRAINING) ** 0.5
CORRECTION = ScalarCorrection((0.93, 0.97, 1.02, 1.04), (1.08, 0.99, 0.95, 1.03))
scalars = st.floats(0.5, 2.0)


def info(flow):
    """What a ComfyUI model of either family would give the solvers."""
    return ModelInfo(flow, first_sigma=0.9999) if flow else ModelInfo(flow, 1.0, TRAINING)


def model(x, sigma, **_):
    """A denoiser that depends on the latent and the noise level, nonlinearly."""
    return torch.tanh(x * 0.7) / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)))


def trajectory_of(sigmas, *solvers, flow=True):
    """The trajectory with these solvers, one a step or one for all."""
    return Trajectory(tuple(sigmas.tolist()), flow, tuple(StepSolver(name) for name in solvers))


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


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_coefficients_of_one_are_the_base_solver_bit_for_bit(name, sigmas, flow):
    solver = get_solver(name)
    args = {"extra_args": {"seed": 7}} | solver.bind(info(flow))

    def seeded(x, sigma, seed):
        return model(x, sigma)

    base = solver.function(seeded, noise(), sigmas, **args)
    ones = ScalarCorrection.identity(4)
    assert torch.equal(solver.function(seeded, noise(), sigmas, correction=ones, **args), base)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_a_batched_rollout_equals_each_trajectory_alone(name, sigmas, flow):
    x, seeds = noise(shape=(3, 4, 6, 6)), (5, 6, 7)
    trajectory = trajectory_of(sigmas, name, flow=flow)
    candidates = [Candidate(trajectory, CORRECTION), Candidate.identity(trajectory)]
    solver = get_solver(name)
    evaluations = 0

    def counted(x, sigma, **extra):
        nonlocal evaluations
        evaluations += 1
        return model(x, sigma)

    solver.function(counted, x, sigmas, {"seed": 1}, **solver.bind(info(flow)))
    later = 2 * 3 * (evaluations - 1)  # every candidate, after the first evaluation
    memo = EvaluationMemo()
    arguments = {"info": info(flow), "seeds": seeds, "memo": memo}
    many = rollout(model, x, sigmas, candidates, **arguments)
    assert many.latents.shape == (2, 3, 4, 6, 6)
    assert many.nfe == 3 + later
    for k, candidate in enumerate(candidates):
        for p, seed in enumerate(seeds):
            alone = solver.function(
                lambda x, sigma, seed: model(x, sigma),
                x[p : p + 1],
                sigmas,
                extra_args={"seed": seed},
                correction=candidate.correction,
                **solver.bind(info(flow)),
            )
            torch.testing.assert_close(many.latents[k, p : p + 1], alone, rtol=1e-6, atol=1e-6)
    again = rollout(model, x, sigmas, candidates, **arguments)
    assert again.nfe == 0
    assert torch.equal(again.latents, many.latents)
    others = rollout(model, x, sigmas, candidates, **arguments | {"samples": ["a", "b", "c"]})
    assert others.nfe == many.nfe  # other prompts share nothing


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("changed", range(4))
def test_candidates_that_differ_from_a_step_on_share_what_is_before_it(name, changed):
    """A step's coefficients are applied after its model evaluation."""
    seeds, x, each = (4, 9), noise(6, (2, 4, 6, 6)), []

    def counted(x, sigma, **_):
        each.append(len(x))
        return model(x, sigma)

    def some(*c_x):
        return Candidate(trajectory_of(FLOW, name), ScalarCorrection(c_x, (1.0,) * 4))

    memo, changes = EvaluationMemo(), [1.01, 1.02, 0.99, 1.0]
    arguments = {"info": info(True), "seeds": seeds, "memo": memo}
    whole = rollout(counted, x, FLOW, [some(*changes)], **arguments)
    evaluations = len(each)
    changes[changed] += 0.05
    part = rollout(counted, x, FLOW, [some(*changes)], **arguments)
    assert part.nfe == sum(each[evaluations:])
    assert not torch.equal(part.latents, whole.latents)
    kept = rollout(model, x, FLOW, [some(*changes)], **arguments | {"memo": EvaluationMemo()})
    assert torch.equal(part.latents, kept.latents)
    if name == "dpmpp_sde":  # two a step; the second sees its own step's c_x
        assert part.nfe <= 2 * (2 * (4 - changed) - 1)
    else:
        assert part.nfe == 2 * (3 - changed)


def test_the_memo_gives_up_what_was_not_used_for_longest():
    memo = EvaluationMemo(max_bytes=3 * 4 * 4)
    rows = {bytes([k]): torch.full((4,), float(k)) for k in range(4)}
    for key, row in list(rows.items())[:3]:
        memo.put(key, row)
    assert memo.get(b"\x00") is not None
    memo.put(b"\x03", rows[b"\x03"])
    assert memo.get(b"\x01") is None
    assert all(torch.equal(memo.get(key), rows[key]) for key in (b"\x00", b"\x02", b"\x03"))


def rolled(x, sigmas, *solvers, flow, seeds=(3, 4)):
    """Final latents [samples, ...] of one corrected candidate."""
    candidate = Candidate(trajectory_of(sigmas, *solvers, flow=flow), CORRECTION)
    return rollout(model, x, sigmas, [candidate], info=info(flow), seeds=seeds).latents[0]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_a_trajectory_of_one_solver_is_that_solver_bit_for_bit(name, sigmas, flow):
    solver, x = get_solver(name), noise()
    arguments = solver.bind(info(flow))
    alone = solver.function(
        lambda x, sigma, seed: model(x, sigma), x, sigmas, {"seed": 8},
        correction=CORRECTION, **arguments,
    )  # fmt: skip
    steps = trajectory_of(sigmas, *[name] * 4, flow=flow).bind(info(flow))
    made = sample_steps(
        steps, lambda x, sigma, seed: model(x, sigma), x, sigmas, {"seed": 8},
        correction=CORRECTION,
    )  # fmt: skip
    assert torch.equal(made, alone)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_2m"])
def test_a_multistep_solver_goes_on_from_any_step_before_it(name):
    """Its first step is Euler's, so is one to sigma 0; what Euler's step saw is history to the next."""
    x = noise()
    longer = torch.tensor([14.6146, 3.5, 1.2, 0.4, 0.2])  # a step to 0 is first order anyway
    whole = rolled(x, longer, *[name] * 4, flow=False)
    begun = rolled(x, longer, "euler", *[name] * 3, flow=False)
    torch.testing.assert_close(begun, whole)
    last = rolled(x, VE, *[name] * 3, "euler", flow=False)
    torch.testing.assert_close(last, rolled(x, VE, *[name] * 4, flow=False))
    plain = rolled(x, longer, *["euler"] * 4, flow=False)
    once = rolled(x, longer, *["euler"] * 3, name, flow=False)
    assert not torch.allclose(once, plain)


def test_solvers_that_draw_from_one_source_never_draw_the_same_noise_twice():
    """Each on its own would begin with the seed's first draw."""
    drawn = []

    def source(x, sigmas, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(sigma, sigma_next):
            drawn.append(torch.randn(x.shape, generator=generator))
            return drawn[-1].to(x)

        return draw

    x = noise()
    steps = trajectory_of(VE, "lcm", "euler_ancestral", "lcm", "euler", flow=False).bind(
        info(False)
    )
    made = source(x, VE, 5)
    sample_steps(steps, lambda x, sigma: model(x, sigma), x, VE, noise=lambda _: made)
    assert len(drawn) == 3
    twice = sample_steps(steps, lambda x, sigma, seed: model(x, sigma), x, VE, {"seed": 5})
    again = sample_steps(steps, lambda x, sigma, seed: model(x, sigma), x, VE, {"seed": 5})
    assert torch.equal(twice, again)
    own = get_solver("euler_ancestral").function(
        lambda x, sigma, seed: model(x, sigma), x, VE[:3], {"seed": 5}
    )
    first = steps[1:2] * 2
    assert torch.equal(
        sample_steps(first, lambda x, sigma, seed: model(x, sigma), x, VE[:3], {"seed": 5}), own
    )


def test_a_trajectory_has_a_solver_for_every_step():
    steps = trajectory_of(VE, "euler", flow=False).bind(info(False))
    with pytest.raises(ValueError, match="3 solvers for 4 steps"):
        sample_steps(steps[:3], model, noise(), VE)


def test_candidates_of_several_trajectories_are_grouped():
    one, other = trajectory_of(FLOW, "euler"), trajectory_of(FLOW, "lcm")
    candidates = [Candidate.identity(t) for t in (one, other, one)]
    assert by_trajectory(candidates) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="several trajectories"):
        rollout(model, noise(), FLOW, candidates, info=info(True), seeds=(1, 2))


def test_a_batch_correction_gives_each_candidate_its_own_scalars():
    x, denoised = noise(1, (4, 1, 2, 2)), noise(2, (4, 1, 2, 2))
    batch = ScalarCorrection.stack(
        [ScalarCorrection((0.9,), (1.1,)), ScalarCorrection((1.2,), (0.7,))]
    )
    scaled, corrected = batch(0, x, denoised)
    for rows, (c_x, c_eps) in ((slice(0, 2), (0.9, 1.1)), (slice(2, 4), (1.2, 0.7))):
        want = precondition(x[rows], denoised[rows], c_x, c_eps)
        torch.testing.assert_close(scaled[rows], want[0])
        torch.testing.assert_close(corrected[rows], want[1])


def test_a_broken_model_stops_with_the_step():
    for broken_value in (torch.nan, torch.inf, -torch.inf):

        def broken(x, sigma, value=broken_value, **_):
            out = model(x, sigma)
            if sigma[0] < 0.8:
                out[0, 0, 0, 0] = value
            return out

        with pytest.raises(ValueError, match="step 3 of 4"):
            sample_euler(broken, noise(), FLOW)


def test_a_second_evaluation_that_breaks_stops_with_the_step():
    def broken(x, sigma, **_):
        return x * torch.nan if 0.75 < sigma[0] < 0.9 else model(x, sigma)

    solver = get_solver("dpmpp_sde")
    with pytest.raises(ValueError, match="step 2 of 4"):
        solver.function(broken, noise(), FLOW, {"seed": 1}, **solver.bind(info(True)))


@pytest.mark.parametrize("name", SOLVERS)
def test_what_can_not_be_sampled_is_refused_before_the_model_runs(name):
    solver = get_solver(name)

    def sample(x, sigmas):
        def never(*_, **__):
            raise AssertionError("the model ran")

        solver.function(never, x, sigmas, {"seed": 1}, **solver.bind(info(True)))

    x = noise()
    with pytest.raises(ValueError, match="NaN or infinity before step 1"):
        sample(torch.where(x > x.max() - 1e-9, torch.inf, x), FLOW)
    with pytest.raises(ValueError, match="empty"):
        sample(x[..., :0], FLOW)
    for sigmas, words in (
        ([0.5], "at least 2"),
        ([0.9, 0.9, 0.0], "must decrease"),
        ([0.5, 0.7, 0.0], "must decrease"),
        ([0.5, float("nan"), 0.0], "finite"),
        ([0.5, -0.1], "not negative"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(x, torch.tensor(sigmas))


def test_large_but_finite_latents_are_not_taken_for_broken():
    """The check sums: float16 and bfloat16 sums must not overflow into a false alarm."""
    for dtype, value in ((torch.float16, 60000.0), (torch.float32, 3e38), (torch.bfloat16, 3e38)):
        x = torch.full((1, 4, 8, 8), value, dtype=dtype)
        sample_euler(lambda x, sigma: torch.zeros_like(x), x, torch.tensor([1.0, 0.0]))


def test_an_unknown_solver_lists_the_known():
    with pytest.raises(ValueError, match="euler_ancestral"):
        get_solver("heun")


@pytest.mark.parametrize("name", SOLVERS)
def test_options_are_checked_by_name_value_and_range(name):
    solver = get_solver(name)
    for option in solver.options:
        for value in (option.minimum - 0.1, option.maximum + 0.1, float("nan"), "1", True, None):
            with pytest.raises(ValueError, match=f"{option.name}=.*{name}.*from 0 to 1"):
                solver.bind(info(True), **{option.name: value})
        assert solver.bind(info(True), **{option.name: option.minimum})[option.name] == 0.0
        assert solver.bind(info(True))[option.name] == option.default
    with pytest.raises(ValueError, match=f"churn=1 is no option of solver {name}"):
        solver.bind(info(True), churn=1)


def test_tcd_says_which_fact_of_the_model_is_missing():
    solver = get_solver("tcd")
    for training, words in ((None, "missing"), (TRAINING.flip(0), "must rise")):
        arguments = solver.bind(ModelInfo(False, training_sigmas=training))
        with pytest.raises(ValueError, match=f"training_sigmas.*{words}"):
            solver.function(model, noise(), VE, {"seed": 1}, **arguments)


def test_a_flow_without_a_first_sigma_is_refused_by_dpmpp_sde():
    solver = get_solver("dpmpp_sde")
    with pytest.raises(ValueError, match="first_sigma is missing"):
        solver.function(model, noise(), FLOW, {"seed": 1}, **solver.bind(ModelInfo(True)))


@given(st.floats(0, 1), st.floats(0.03, 14.6))
def test_tcd_never_aims_above_the_noise_level_it_returns_to(gamma, sigma):
    """A negative variance there is a NaN picture; sigmas need not be training sigmas."""
    training = TRAINING.tolist()
    target = target_sigma(sigma, gamma, training)
    assert 0 < target <= sigma
    if gamma == 0:
        assert target == sigma


@given(st.integers(0, 999))
def test_a_training_sigma_is_its_timestep(index):
    assert timestep_of(float(TRAINING[index]), TRAINING.tolist()) == index
