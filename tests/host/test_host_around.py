"""Around Sampler with ComfyUI's own samplers, inside the real ComfyUI."""

from __future__ import annotations

import importlib

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import (
    C_EPS,
    C_X,
    ONES,
    STEPS,
    flow,
    inpainting,
    ours,
    same_within,
    schedule_of,
    video,
    with_cfg,
)

samplers = importlib.import_module("comfy.samplers")
host = importlib.import_module("qsched_pack.nodes.host.sampling")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")

OTHERS = ("euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc", "dpmpp_2m_sde", "deis")


AROUND = [(graph, name) for graph in (with_cfg, flow) for name in ("euler", "heun")] + [
    pytest.param(graph, name, marks=pytest.mark.full)
    for graph, names in (
        (flow, OTHERS[2:]),
        (with_cfg, ("uni_pc",)),
        (inpainting, ("euler", "heun", "uni_pc")),
        (video, ("euler", "heun", "uni_pc")),
    )
    for name in names
]


@pytest.mark.parametrize(
    ("graph", "name"), AROUND, ids=lambda value: getattr(value, "__name__", value)
)
def test_around_a_sampler_of_comfyuis(graph, name, files):
    draw = graph(files)

    def around(name: str, c_x=C_X, c_eps=C_EPS):
        schedule = schedule_of(draw.model, "euler", c_x, c_eps)
        return draw(
            host.make_around_sampler(schedule, samplers.sampler_object(name), "interpolate")
        )

    core = draw(samplers.sampler_object(name))
    assert torch.equal(around(name, ONES, ONES), core)
    moved = around(name)
    assert not same_within(moved, core, 1e-3)
    if name == "euler":
        assert same_within(moved, draw(ours(draw, "euler")), 1e-4)


def around_with(draw, sampler, options: dict, solver="euler_ancestral", mode="strict"):
    """Draw with a schedule of ``solver``, learned with ``options``, around ``sampler``."""
    trajectory = trajectories.trajectory_of(draw.model, solver, "simple", STEPS, options)
    learned = schedules.QSchedule(trajectory, corrections.ScalarCorrection(C_X, C_EPS))
    return draw(host.make_around_sampler(learned, sampler, mode))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_around_a_sampler_its_own_options_are_compared(eta, files, caplog):
    draw = with_cfg(files)
    same = samplers.ksampler("euler_ancestral", {"eta": eta, "s_noise": 1.0})
    assert torch.isfinite(around_with(draw, same, {"eta": eta})).all()
    if eta == 1.0:  # the sampler's own default
        around_with(draw, samplers.sampler_object("euler_ancestral"), {"eta": eta})
    assert not caplog.records
    other = samplers.ksampler("euler_ancestral", {"eta": 0.25})
    with pytest.raises(ValueError, match=f"eta {eta}, not 0.25"):
        around_with(draw, other, {"eta": eta})
    around_with(draw, other, {"eta": eta}, mode="interpolate")
    assert f"eta {eta}, not 0.25" in caplog.text


@pytest.mark.parametrize("name", ["heun", "uni_pc", "euler"])
def test_around_another_sampler_options_that_it_has_not_are_no_difference(name, files, caplog):
    around_with(with_cfg(files), samplers.sampler_object(name), {"eta": 0.5})
    assert not caplog.records


def test_around_comfyuis_ddim_a_schedule_of_a_random_one_differs(files):
    draw, ddim = with_cfg(files), samplers.sampler_object("ddim")
    assert torch.isfinite(around_with(draw, ddim, {"eta": 0.0}, "ddim")).all()
    with pytest.raises(ValueError, match=r"eta 0\.5, not 0"):
        around_with(draw, ddim, {"eta": 0.5}, "ddim")
