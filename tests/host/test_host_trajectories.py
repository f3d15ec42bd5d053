"""Noise levels and steps are those of ComfyUI's KSampler."""

from __future__ import annotations

import importlib

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import FLUX_SCHNELL, SD15, SEED, conditioning, drawing, ours, plain

comfy_sample = importlib.import_module("comfy.sample")
samplers = importlib.import_module("comfy.samplers")
host = importlib.import_module("qsched_pack.nodes.host.sampling")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
candidates = importlib.import_module("qsched_pack.qsched_core.trajectory")


def outcome(make) -> str:
    try:
        return str(make().tolist())  # NaN is NaN
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("scheduler", samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_sigmas_are_ksamplers(small, scheduler, files):
    model = plain(files, small)
    differ = []
    for steps in range(1, 21):
        for denoise in (1.0, 0.99995, 0.9999, 0.95, 0.7, 0.5, 0.3):
            args = (model, steps, "cpu", "euler", scheduler, denoise)
            wanted = outcome(lambda args=args: samplers.KSampler(*args).sigmas)
            found = outcome(
                lambda s=steps, d=denoise: trajectories.sigmas_and_flow(model, scheduler, s, d)[0]
            )
            if found != wanted:
                differ.append((steps, denoise))
    assert not differ


@pytest.mark.parametrize("steps", [4, 6])  # of 6, ddim_uniform makes 7
@pytest.mark.parametrize(("start", "end"), [(0, None), (2, 10_000), (0, 6), (1, 3)])
def test_the_ksampler_is_comfyuis_where_a_scheduler_makes_more_steps(steps, start, end, files):
    model, positive = plain(files, SD15), conditioning(SD15)
    latent = torch.zeros(SD15.latent)
    core = comfy_sample.sample(
        model, comfy_sample.prepare_noise(latent, SEED), steps, 1.0, "euler", "ddim_uniform",
        positive, positive, latent, start_step=start, last_step=end, force_full_denoise=True,
        seed=SEED, disable_pbar=True,
    )  # fmt: skip
    made = host.ksampler(
        model, schedules.QSchedule.identity(candidates.Trajectory.of((1.0, 0.0), flow=False)), "euler", "interpolate", None,
        seed=SEED, steps=steps, cfg=1.0, scheduler="ddim_uniform", positive=positive,
        negative=positive, latent={"samples": latent}, start=start, end=end,
    )  # fmt: skip
    assert torch.equal(made["samples"], core)


def test_a_distilled_models_timesteps_are_all_known(files):
    """ComfyUI keeps 50 of an LCM model's 1000 noise levels; TCD counts in all of them."""
    advanced = importlib.import_module("comfy_extras.nodes_model_advanced")
    model = plain(files, SD15)
    (lcm,) = advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    sampling = lcm.get_model_object("model_sampling")
    assert len(sampling.sigmas) == 50
    found = trajectories.solver_info(sampling, lcm.model.model_config).training_sigmas
    assert torch.equal(found, model.get_model_object("model_sampling").sigmas)
    draw = drawing(lcm, conditioning(SD15), shape=SD15.latent)
    assert torch.isfinite(draw(ours(draw, "tcd"))).all()
