"""Orders, correctors and what the step before adds: USF's decisions (arXiv 2312.07243) a step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_solvers import CORRECTION, FLOW, VE, info, model, noise

from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule
from qsched_core.solvers import SOLVERS, get_solver, sample_steps
from qsched_core.trajectory import Candidate, StepSolver, Trajectory, rollout
from qsched_core.validation import ScheduleError

CORRECTABLE = [name for name, solver in SOLVERS.items() if solver.corrector is not None]
MULTISTEP = ["dpmpp_2m", "dpm_2m", "res_multistep", "lms_2"]


def run(sigmas, *solvers, flow=True, correction=None, denoise=model, x=None):
    """The last latent of steps with ``solvers`` (name, options), one a step or one for all."""
    steps = tuple(StepSolver(name, options) for name, options in solvers)
    bound = Trajectory(tuple(sigmas.tolist()), flow, steps).bind(info(flow))
    start = noise() if x is None else x
    return sample_steps(bound, denoise, start, sigmas.double(), correction=correction)


def test_lms_2_is_the_published_method_with_the_correction():
    """k-diffusion's linear multistep of order 2: the line through two slopes, integrated."""
    sigmas, expected, before = FLOW.tolist(), noise(), None
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        denoised = model(expected, torch.tensor([sigma]))
        slope = CORRECTION.c_eps[i] * (expected - denoised) / sigma
        expected = CORRECTION.c_x[i] * expected
        if before is None:
            expected = expected + (to - sigma) * slope
        else:
            past, old = before
            square = ((to - sigma) ** 2 - 0) / 2
            expected = expected + (to - sigma) * slope + square * (slope - old) / (sigma - past)
        before = (sigma, slope)
    torch.testing.assert_close(run(FLOW, ("lms_2", {}), correction=CORRECTION), expected)


@pytest.mark.parametrize("name", ["euler", *MULTISTEP])
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_a_corrected_step_ends_where_the_line_through_both_predictions_leads(name, sigmas, flow):
    """Euler's first step once more, by numerical integration: of eps in sigma, of D in log(sigma)."""
    start, end, last = sigmas[:3].double().tolist()
    x = noise()
    first = model(x, torch.tensor([start]))
    rough = x + (end - start) * (x - first) / start
    second = model(rough, torch.tensor([end]))
    if name in ("dpmpp_2m", "res_multistep"):
        length, count = math.log(start / end), 20000
        grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        weight = (length / count) * torch.exp(-length * (1 - grid))  # of D at each place
        exact = (
            end / start * x + (weight * (1 - grid)).sum() * first + (weight * grid).sum() * second
        )
    else:
        exact = x + (end - start) * ((x - first) / start + (rough - second) / end) / 2
    short = sigmas[:3]
    found = run(short, (name, {"corrector": 1.0}), ("euler", {}), flow=flow)
    expected = exact + (last - end) * (exact - second) / end
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CORRECTABLE)
def test_half_a_corrector_goes_half_the_way_and_none_changes_nothing(name):
    short = FLOW[:3]

    def seen(share):
        """The latent that the second step starts from."""
        options = {} if share is None else {"corrector": share}
        here = []
        steps = (StepSolver(name, options), StepSolver())
        bound = Trajectory(tuple(short.tolist()), True, steps).bind(info(True))
        sample_steps(
            bound, model, noise(), short.double(), callback=lambda at: here.append(at["x"])
        )
        return here[1]

    torch.testing.assert_close(seen(0.5), (seen(0.0) + seen(1.0)) / 2)
    assert torch.equal(seen(0.0), seen(None))
    assert not torch.allclose(seen(1.0), seen(0.0))


@pytest.mark.parametrize("name", CORRECTABLE)
def test_a_corrector_has_order_2_at_no_evaluation_more(name):
    """Halving the steps of a smooth problem quarters the error, and counts as many evaluations."""
    calls = 0

    def smooth(x, sigma, **_):
        nonlocal calls
        calls += 1
        return x - sigma[0] * torch.sin(x + sigma[0])

    def end(steps, options):
        sigmas = torch.linspace(1.0, 0.25, steps + 1, dtype=torch.float64)
        return run(sigmas, (name, options), denoise=smooth, x=noise(shape=(2, 5)))

    exact = end(1000, {"corrector": 1.0})
    calls = 0
    errors = [float((end(n, {"corrector": 1.0}) - exact).norm()) for n in (16, 32, 64)]
    assert calls == 16 + 32 + 64
    assert all(3 < a / b < 5.5 for a, b in pairwise(errors))
    if name == "euler":
        assert errors[0] < 0.2 * float((end(16, {}) - exact).norm())


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize(("sigmas", "flow"), [(FLOW, True), (VE, False)])
def test_c_1_is_the_share_of_the_second_order(name, sigmas, flow):
    """0 is the first order, Euler's; 1 the solver itself, bit for bit; one step is linear in it."""
    first = run(sigmas, ("euler", {}), flow=flow, correction=CORRECTION)
    none = run(sigmas, (name, {"c_1": 0.0}), flow=flow, correction=CORRECTION)
    torch.testing.assert_close(none, first)
    whole = run(sigmas, (name, {}), flow=flow, correction=CORRECTION)
    assert torch.equal(run(sigmas, (name, {"c_1": 1.0}), flow=flow, correction=CORRECTION), whole)
    once = [run(sigmas[:3], ("euler", {}), (name, {"c_1": c}), flow=flow) for c in (0.0, 1.0, 1.5)]
    torch.testing.assert_close(once[2], once[0] + 1.5 * (once[1] - once[0]))


def test_a_corrected_step_is_corrected_by_c_afterwards():
    """c_x moves the corrected end, not the rough one that the model saw."""
    moved = ScalarCorrection((1.0, 1.1), (1.0, 1.0))
    sigmas = FLOW[:3]
    ends = []

    def watch(at):
        ends.append(at["x"].clone())

    steps = (StepSolver("euler", {"corrector": 1.0}), StepSolver())
    bound = Trajectory(tuple(sigmas.tolist()), True, steps).bind(info(True))
    found = sample_steps(bound, model, noise(), sigmas.double(), None, watch, correction=moved)
    start = ends[1]
    seen = run(sigmas[:2], ("euler", {}))
    eps = (start - model(seen, sigmas[1:2])) / sigmas[1]
    expected = 1.1 * start + (sigmas[2] - sigmas[1]) * eps
    torch.testing.assert_close(found, expected.double())


def test_candidates_of_a_learned_trajectory_are_what_each_is_alone():
    solvers = (
        StepSolver("euler", {"corrector": 1.0}), StepSolver("dpmpp_2m", {"corrector": 1.0}),
        StepSolver("dpm_2m", {"c_1": 0.8}), StepSolver("lms_2"),
    )  # fmt: skip
    trajectory = Trajectory(tuple(FLOW.tolist()), True, solvers)
    candidates = [Candidate.identity(trajectory), Candidate(trajectory, CORRECTION)]
    both = rollout(model, noise(), FLOW.double(), candidates, info=info(True), seeds=(3, 4)).latents
    for candidate, found in zip(candidates, both, strict=True):
        alone = rollout(
            model, noise(), FLOW.double(), [candidate], info=info(True), seeds=(3, 4)
        ).latents[0]
        assert torch.equal(alone, found)


def test_a_schedule_keeps_what_was_learned_of_its_steps():
    learned = StepSolver("dpmpp_2m", {"corrector": 1.0, "c_1": 0.85})
    for solvers in ((learned,), (StepSolver(), learned, learned, StepSolver("lms_2"))):
        trajectory = Trajectory(tuple(FLOW.tolist()), True, solvers)
        assert not trajectory.is_uniform
        schedule = QSchedule(trajectory, CORRECTION)
        again = QSchedule.from_json(schedule.to_json())
        assert again == schedule and again.trajectory.solvers == trajectory.solvers
        assert "dpmpp_2m (corrector 1, c_1 0.85)" in schedule.describe()
    assert Trajectory.of(FLOW.tolist(), "dpmpp_2m").is_uniform


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("euler", {"corrector": 1.5}, "corrector=1.5.*from 0 to 1"),
        ("dpmpp_2m", {"c_1": -1}, "c_1=-1.*from 0 to 2"),
        ("lcm", {"corrector": 1}, "no option of solver lcm"),
        ("euler", {"c_1": 1}, "no option of solver euler; it has corrector"),
    ],
)
def test_an_option_that_a_solver_does_not_have_is_refused(name, options, said):
    with pytest.raises(ScheduleError, match=said):
        StepSolver(name, options)


def test_nobody_is_asked_for_what_only_a_search_sets():
    for name in CORRECTABLE:
        solver = get_solver(name)
        assert not {o.name for o in solver.options} & {"corrector", "c_1"}
        assert solver.check({}) == {}
