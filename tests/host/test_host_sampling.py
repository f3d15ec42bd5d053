"""The sampler in graphs that differ from a plain one, inside the real ComfyUI.

The same must come out of ComfyUI's own sampler and of ours at coefficients of 1, and known pixels
must survive any.
"""

from __future__ import annotations

import importlib

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import (
    GRAPHS,
    MASKED,
    ONES,
    SEED,
    SHARED,
    differential_diffusion,
    flow,
    inpainting,
    inpainting_flow,
    levels_of,
    ours,
    same_within,
    with_cfg,
)

comfy_sample = importlib.import_module("comfy.sample")
samplers = importlib.import_module("comfy.samplers")
solvers = importlib.import_module("qsched_pack.qsched_core.solvers")

# All solvers where the model's kind differs; what else a graph has they meet in the same place.
OWN = [(graph, "euler_ancestral") for graph in GRAPHS] + [
    pytest.param(graph, solver, marks=() if solver == "dpmpp_sde" else pytest.mark.full)
    for graph in (with_cfg, flow)
    for solver in SHARED
    if solver != "euler_ancestral"
]


@pytest.mark.parametrize(
    ("graph", "solver"), OWN, ids=lambda value: getattr(value, "__name__", value)
)
def test_ones_give_comfyuis_own_latent_and_others_do_not(graph, solver, files):
    draw = graph(files)
    core = draw(samplers.sampler_object(solver))
    assert torch.isfinite(core).all() and core.std() > 0.05
    assert torch.equal(draw(ours(draw, solver, ONES, ONES)), core)
    moved = draw(ours(draw, solver))
    assert torch.isfinite(moved).all()
    assert not same_within(moved, core, 1e-3)
    assert torch.equal(draw(ours(draw, solver)), moved), "the same seed, the same latent"


@pytest.mark.parametrize(
    ("graph", "solver"),
    [(inpainting_flow, solver) for solver in solvers.SOLVERS]
    + [(graph, "euler_ancestral") for graph in MASKED]
    + [(inpainting, "tcd")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_known_pixels_are_untouched_by_any_coefficients(graph, solver, files):
    draw = graph(files)
    found = draw(ours(draw, solver))
    known = (draw.mask == 0).expand_as(found)
    assert known.any() and not known.all()
    assert same_within(found[known], draw.latent[known], 2e-5)
    assert not same_within(found[~known], draw.latent[~known], 0.1)


def test_under_a_differential_mask_a_pixel_is_known_until_its_step(files):
    """While a pixel is known its latent is the picture's own, not one that coefficients moved."""
    draw, seen = differential_diffusion(files), []
    unmasked = ours(draw, "euler")
    around = unmasked.sampler_function

    def watched(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def keep(state):
            seen.append((float(state["sigma"]), state["x"].clone()))
            callback(state)

        return around(model, x, sigmas, extra_args, keep, disable)

    draw(samplers.KSAMPLER(watched))
    noise = comfy_sample.prepare_noise(draw.latent, SEED)
    sampling = draw.model.get_model_object("model_sampling")
    for index, (sigma, x) in enumerate(seen):
        mask = draw.model.model_options["denoise_mask_function"](
            torch.tensor([sigma]),
            draw.mask,
            extra_options={"model": _Inner(sampling), "sigmas": levels_of(draw.model)},
        )
        known = (mask == 0).expand_as(x)
        assert known.any(), index
        wanted = draw.model.model.process_latent_in(draw.latent) + sigma * noise
        # The first latent has a little more noise (ComfyUI's max_denoise).
        assert same_within(x[known], wanted[known], 1e-2), index


class _Inner:
    def __init__(self, sampling):
        self.inner_model = type("Inner", (), {"model_sampling": sampling})


def test_nan_in_the_model_names_the_step(files):
    draw, calls = with_cfg(files), []

    def break_it(args):
        calls.append(args)
        return args["denoised"] * (torch.nan if len(calls) > 2 else 1)

    draw.model.set_model_sampler_post_cfg_function(break_it)
    with pytest.raises(ValueError, match="step 3 of 4"):
        draw(ours(draw, "euler"))


def test_nan_in_the_latent_is_named_before_the_first_step(files):
    draw = inpainting(files)
    draw.latent[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"latent.*NaN"):
        draw(ours(draw, "euler"))


@pytest.mark.parametrize(
    ("sigmas", "message"), [([1.0], "at least 2"), ([0.5, 0.9, 0.0], "must decrease")]
)
def test_sigmas_that_can_not_be_sampled(sigmas, message, files):
    draw = with_cfg(files)
    with pytest.raises(ValueError, match=message):
        draw(ours(draw, "euler"), torch.tensor(sigmas))
