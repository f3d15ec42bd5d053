"""c = 1 against the samplers of the real ComfyUI: equal bit for bit."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import inside  # noqa: F401  ComfyUI and the pack become importable
import pytest
import torch

samplers = importlib.import_module("comfy.samplers")
model_sampling = importlib.import_module("comfy.model_sampling")
solver_info = importlib.import_module("qsched_pack.nodes.host.trajectories").solver_info
solvers = importlib.import_module("qsched_pack.qsched_core.solvers")
ScalarCorrection = importlib.import_module("qsched_pack.qsched_core.correction").ScalarCorrection
SOLVERS, get_solver = solvers.SOLVERS, solvers.get_solver

FAMILIES = {
    "flow": ("CONST", "ModelSamplingDiscreteFlow"),
    "epsilon": ("EPS", "ModelSamplingDiscrete"),
    "v": ("V_PREDICTION", "ModelSamplingDiscrete"),
}
IN_CORE = [name for name in SOLVERS if name not in ("tcd", "dpm_2m", "lms_2")]  # ComfyUI lacks them


class _Denoiser:
    """What a ComfyUI sampler sees: a callable with the model sampling two levels down."""

    def __init__(self, sampling):
        self.sampling = sampling
        self.patcher = SimpleNamespace(get_model_object=lambda name: sampling)
        base = SimpleNamespace(model_sampling=sampling)
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=self.patcher)

    def __call__(self, x, sigma, seed=None):
        """A prediction in the family's own parametrisation, turned into D by ComfyUI."""
        scaled = self.sampling.calculate_input(sigma, x)
        output = torch.tanh(scaled * 0.7) / (1 + sigma.reshape(-1, 1, 1, 1))
        return self.sampling.calculate_denoised(sigma, output, x)


def sampling_of(family):
    kind, schedule = (getattr(model_sampling, name) for name in FAMILIES[family])
    return type("ModelSampling", (schedule, kind), {})()


def ours(name, denoiser, x, sigmas, correction, seed=11, **options):
    solver = get_solver(name)
    arguments = solver.bind(solver_info(denoiser.sampling), **options)
    return solver.function(denoiser, x, sigmas, {"seed": seed}, correction=correction, **arguments)


def theirs(name, denoiser, x, sigmas, seed=11, **options):
    sampler = samplers.sampler_object(name)
    return sampler.sampler_function(
        denoiser, x, sigmas, extra_args={"seed": seed}, disable=True, **options
    )


def start(sampling, batch, scheduler="simple", steps=4):
    sigmas = samplers.calculate_sigmas(sampling, scheduler, steps)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * sigmas[0]
    return x, sigmas


@pytest.mark.parametrize("name", IN_CORE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform", "karras"])
def test_coefficients_of_one_equal_comfyui_bit_for_bit(name, family, batch, scheduler):
    denoiser = _Denoiser(sampling_of(family))
    x, sigmas = start(denoiser.sampling, batch, scheduler)
    given = x.clone()
    core = theirs(name, denoiser, x, sigmas)
    assert torch.isfinite(core).all()
    for correction in (None, ScalarCorrection((1.0,) * 4, (1.0,) * 4)):
        assert torch.equal(ours(name, denoiser, x, sigmas, correction), core)
        assert torch.equal(x, given)  # the caller's latent is not written to
    for moved in (
        ScalarCorrection((1.01,) * 4, (1.0,) * 4),
        ScalarCorrection((1.0,) * 4, (1.01,) * 4),
    ):
        assert not torch.equal(ours(name, denoiser, x, sigmas, moved), core)
        assert torch.equal(x, given)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_eta_is_comfyuis(name, family, eta):
    denoiser = _Denoiser(sampling_of(family))
    x, sigmas = start(denoiser.sampling, 2)
    core = theirs(name, denoiser, x, sigmas, eta=eta)
    assert torch.equal(ours(name, denoiser, x, sigmas, None, eta=eta), core)


@pytest.mark.parametrize("name", ["euler_ancestral", "lcm", "dpmpp_sde"])
def test_a_models_noise_scale_is_comfyuis(name):
    sampling = sampling_of("flow")
    sampling.set_noise_scale(8.0)
    denoiser = _Denoiser(sampling)
    x, sigmas = start(sampling, 2)
    core = theirs(name, denoiser, x, sigmas)
    assert torch.equal(ours(name, denoiser, x, sigmas, None), core)


@pytest.mark.parametrize("name", IN_CORE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [slice(0, 3), slice(2, 5), slice(3, 5)])
def test_parts_of_a_trajectory_equal_comfyui(name, family, part):
    """img2img enters in the middle; the advanced sampler leaves before the end."""
    denoiser = _Denoiser(sampling_of(family))
    x, sigmas = start(denoiser.sampling, 2)
    try:
        core = theirs(name, denoiser, x, sigmas[part])
    except ValueError as error:  # core's Brownian tree has no interval on a single step to 0
        assert name == "dpmpp_sde" and len(sigmas[part]) == 2, error
        core = denoiser(x, sigmas[part][:1].expand(2))
    assert torch.equal(ours(name, denoiser, x, sigmas[part], None), core)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_fixes_the_image(name, family):
    denoiser = _Denoiser(sampling_of(family))
    x, sigmas = start(denoiser.sampling, 3)
    correction = ScalarCorrection((0.98, 1.01, 1.02, 1.0), (1.03, 0.98, 1.0, 1.01))
    first = ours(name, denoiser, x, sigmas, correction, seed=5)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(ours(name, denoiser, x, sigmas, correction, seed=5), first)
    options = {"eta": 1.0} if name == "ddim" else {}
    other = [ours(name, denoiser, x, sigmas, correction, seed=s, **options) for s in (5, 6)]
    deterministic = name in ("euler", "dpmpp_2m", "dpm_2m", "res_multistep", "lms_2")
    assert torch.equal(*other) == deterministic


@pytest.mark.parametrize("family", FAMILIES)
def test_tcd_between_its_neighbours(family):
    """ComfyUI has no tcd: gamma 0 is its euler, gamma 1 (on timestep 0's level) nearly its lcm.

    The published scheduler's last step goes to timestep 0, not to sigma 0, and keeps VP's scale.
    """
    denoiser = _Denoiser(sampling_of(family))
    x, sigmas = start(denoiser.sampling, 2)
    levels, scale = sigmas, 1.0
    if family != "flow":
        last = denoiser.sampling.sigmas[0]
        levels, scale = torch.cat([sigmas[:-1], last[None]]), (1 + last**2) ** -0.5
    plain = ours("tcd", denoiser, x, sigmas, None, gamma=0.0)
    torch.testing.assert_close(plain, scale * theirs("euler", denoiser, x, levels))
    full = ours("tcd", denoiser, x, sigmas, None, gamma=1.0)
    near = theirs("lcm", denoiser, x, sigmas)
    close = 1e-5 if family == "flow" else 0.1
    torch.testing.assert_close(full, near, rtol=close, atol=close)
