"""Learned noise levels in ComfyUI: where they come from, and the nodes that take them."""

from __future__ import annotations

import importlib
from io import BytesIO
from types import SimpleNamespace

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import C_EPS, C_X, FLUX_SCHNELL, SD15, SEED, conditioning, plain
from PIL import Image, PngImagePlugin

comfy_sample = importlib.import_module("comfy.sample")
samplers = importlib.import_module("comfy.samplers")
sampling = importlib.import_module("qsched_pack.nodes.host.sampling")
evaluation = importlib.import_module("qsched_pack.nodes.host.evaluation")
sources = importlib.import_module("qsched_pack.nodes.host.source")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
schedule_nodes = importlib.import_module("qsched_pack.nodes.schedules")
sharing = importlib.import_module("qsched_pack.nodes.sharing")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
core = importlib.import_module("qsched_pack.qsched_core.trajectory")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")
levels = importlib.import_module("qsched_pack.qsched_core.search.levels")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")

STEPS = 4


def learned(model, correction=None, steps=STEPS):
    """A schedule whose levels are those of 20 steps of the scheduler, not evenly chosen."""
    fine, flow = trajectories.sigmas_and_flow(model, "normal", 20)
    before, _ = trajectories.sigmas_and_flow(model, "simple", steps)
    chosen = [
        0,
        *sorted(
            torch.randperm(18, generator=torch.Generator().manual_seed(1))[: steps - 1]
            .add(1)
            .tolist()
        ),
        20,
    ]
    trajectory = core.Trajectory.of([fine[i].item() for i in chosen], "euler", flow)
    return schedules.QSchedule(
        trajectory,
        correction or corrections.ScalarCorrection.identity(steps),
        {"sampling": {"sigmas": before.tolist(), "solver": "euler", "options": {}}},
    )


def drawn(model, schedule, small=SD15, scheduler="as learned", steps=7, mode="interpolate", **more):
    positive = conditioning(small)
    return sampling.ksampler(
        model, schedule, "euler", mode, None, seed=SEED, steps=steps, cfg=1.0, scheduler=scheduler,
        positive=positive, negative=positive, latent={"samples": torch.zeros(small.latent)}, **more,
    )["samples"]  # fmt: skip


@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_the_ksampler_makes_the_pictures_of_the_learned_levels(small, files):
    model, positive = plain(files, small), conditioning(small)
    schedule, latent = learned(model), torch.zeros(small.latent)
    noise = comfy_sample.prepare_noise(latent, SEED)
    wanted = comfy_sample.sample_custom(
        model, noise, 1.0, samplers.sampler_object("euler"), torch.tensor(schedule.sigmas),
        positive, positive, latent, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    assert torch.equal(drawn(model, schedule, small, mode="strict"), wanted)
    half = comfy_sample.sample_custom(
        model, noise, 1.0, samplers.sampler_object("euler"), torch.tensor(schedule.sigmas[2:]),
        positive, positive, latent, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    assert torch.equal(drawn(model, schedule, small, denoise=0.5), half)


@pytest.mark.parametrize("identity", [True, False])
def test_other_levels_than_the_learned_are_told_or_refused(identity, files, caplog):
    model = plain(files, SD15)
    schedule = learned(model, None if identity else corrections.ScalarCorrection(C_X, C_EPS))
    drawn(model, schedule, scheduler="simple", steps=STEPS)
    assert "noise levels of this schedule were learned too" in caplog.text
    with pytest.raises(schedules.ScheduleError, match="sigma that was not learned"):
        drawn(model, schedule, scheduler="simple", steps=STEPS, mode="strict")
    caplog.clear()
    drawn(model, schedule)
    assert not caplog.text


def test_any_sampler_gets_the_learned_levels(files):
    model = plain(files, SD15)
    schedule = learned(model)
    (found,) = schedule_nodes.QSchedSigmas.execute(schedule).args
    assert found.tolist() == pytest.approx(schedule.sigmas, rel=1e-6)


def test_learned_levels_travel_in_text_in_a_picture_and_through_an_edit(files, monkeypatch):
    monkeypatch.setattr(sharing.ui, "PreviewImage", lambda *a, **k: SimpleNamespace(as_dict=dict))
    monkeypatch.setattr(
        sharing.QSchedShowSchedule, "hidden", SimpleNamespace(unique_id=None), raising=False
    )
    schedule = learned(plain(files, SD15), corrections.ScalarCorrection(C_X, C_EPS))
    image, text, summary = sharing.QSchedShowSchedule.execute(schedule).args
    assert "levels: noise levels learned, in place of 14.6" in summary and image.std() > 0.01
    picture, metadata = BytesIO(), PngImagePlugin.PngInfo()
    metadata.add_text("workflow", text)
    Image.new("RGB", (8, 8)).save(picture, "PNG", pnginfo=metadata)
    with Image.open(picture) as opened:
        (again,) = sharing.QSchedScheduleFromText.execute(opened.text["workflow"]).args
    assert again == schedule and again.replaced_sigmas == schedule.replaced_sigmas
    (edited,) = schedule_nodes.QSchedEditSchedule.execute(
        again, step=1, mode="add", c_x=0.01, c_eps=0.0
    ).args
    assert edited.trajectory == schedule.trajectory
    assert edited.replaced_sigmas == schedule.replaced_sigmas


def test_an_evaluation_has_the_learned_levels_and_the_chosen_solver(files):
    model = plain(files, SD15)
    for steps in (STEPS, STEPS + 2):
        source = SimpleNamespace(
            model=model, trajectory=trajectories.trajectory_of(model, "lcm", "simple", steps)
        )
        candidate, _ = evaluation.scheduled_on(learned(model), source)
        assert candidate.trajectory.sigmas == learned(model).sigmas
        assert candidate.trajectory.solver == "lcm"


class Words:
    """A text encoder whose prompts are numbers."""

    def __init__(self, small):
        self.small = small

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(self.small, int(tokens))


def source_of(model, scheduler="simple", steps=2, small=SD15):
    trajectory = trajectories.trajectory_of(model, "euler", scheduler, steps)
    return sources.ComfySource(
        model, Words(small), None, trajectory, width=64, height=64, scheduler=scheduler
    )


@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_the_fine_path_has_the_schedulers_levels(small, files):
    model = plain(files, small)
    for scheduler in ("simple", "normal", "karras"):
        found = source_of(model, scheduler).fine(12)
        wanted, flow = trajectories.sigmas_and_flow(model, scheduler, 12)
        assert found == core.Trajectory.of(wanted.tolist(), "euler", flow)


def test_a_scheduler_that_makes_other_steps_is_named(files):
    model = plain(files, SD15)
    with pytest.raises(
        schedules.ScheduleError, match="ddim_uniform gives 7 steps when asked for 6"
    ):
        source_of(model, "ddim_uniform").fine(6)


@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_levels_are_learned_from_a_comfyui_model(small, files):
    """A model with random weights says nothing of quality: the steps' least squares must hold."""
    source = source_of(plain(files, small), small=small)
    prompts = prompt_sets.PromptSet(("1", "2", "3"), (1, 2, 3))
    found = levels.learned_levels(source, prompts, 6)
    assert found.nfe == source.nfe == 3 * (6 + 2)
    fine = source.fine(6).sigmas
    for proposal in found.proposals:
        assert set(proposal.candidate.trajectory.sigmas) <= set(fine)
    assert list(found.costs) == sorted(found.costs, reverse=True)
    assert found.costs[-1] == pytest.approx(0, abs=1e-3)
