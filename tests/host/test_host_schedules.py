"""Schedules of several solvers, and of other kinds of models, in the nodes that take a schedule."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import C_EPS, C_X, FLUX_SCHNELL, SD15, SEED, STEPS, conditioning, plain, with_cfg

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
solvers = importlib.import_module("qsched_pack.qsched_core.solvers")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")

TWO = [core.StepSolver("euler"), core.StepSolver("euler")]
MIXED = (*TWO, core.StepSolver("tcd", {"gamma": 0.5}), core.StepSolver("dpmpp_2m"))
HALVES = tuple(core.StepSolver("tcd", {} if i < 2 else {"gamma": 0.5}) for i in range(STEPS))


def schedule_of(model, solvers, correction=None):
    sigmas, flow = trajectories.sigmas_and_flow(model, "simple", STEPS)
    trajectory = core.Trajectory(sigmas.tolist(), flow, solvers)
    return schedules.QSchedule(trajectory, correction or corrections.ScalarCorrection(C_X, C_EPS))


def drawn(
    model, schedule, small=SD15, scheduler="simple", solver="euler", mode="interpolate", steps=STEPS,
    seed=SEED, **options,
):  # fmt: skip
    positive = conditioning(small)
    return sampling.ksampler(
        model, schedule, solver, mode, None, seed=seed, steps=steps, cfg=1.0, scheduler=scheduler,
        positive=positive, negative=positive, latent={"samples": torch.zeros(small.latent)},
        options=options,
    )["samples"]  # fmt: skip


def named(*names):
    return tuple(core.StepSolver(name) for name in names)


@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_a_schedule_of_several_solvers_runs_them_whatever_the_widget_says(small, files, caplog):
    """The last step goes to 0, where 2M is Euler: ComfyUI's own 2M is the picture of both."""
    model, positive = plain(files, small), conditioning(small)
    ones = corrections.ScalarCorrection.identity(STEPS)
    mixed = schedule_of(model, named(*["dpmpp_2m"] * (STEPS - 1), "euler"), ones)
    latent = torch.zeros(small.latent)
    wanted = comfy_sample.sample_custom(
        model, comfy_sample.prepare_noise(latent, SEED), 1.0, samplers.sampler_object("dpmpp_2m"),
        torch.tensor(mixed.sigmas), positive, positive, latent, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    for scheduler, mode in (("as learned", "strict"), ("simple", "interpolate")):
        found = drawn(model, mixed, small, scheduler, solver="lcm", mode=mode)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not caplog.text
    other = drawn(
        model, schedule_of(model, named("euler", *["dpmpp_2m"] * (STEPS - 1)), ones), small
    )
    torch.testing.assert_close(other, wanted, rtol=1e-4, atol=1e-4)
    plain_euler = drawn(model, schedule_of(model, named("euler"), ones), small)
    assert not torch.allclose(plain_euler, wanted, atol=1e-2)


def test_at_other_levels_each_step_has_the_nearest_learned_solver(files):
    model = plain(files, SD15)
    schedule = schedule_of(model, MIXED)
    names = [step.name for step in schedule.at(schedule.sigmas[1:]).solvers]
    assert names == ["euler", "tcd", "dpmpp_2m"]
    finer, _ = trajectories.sigmas_and_flow(model, "simple", 9)
    match = schedule.at(finer.tolist())
    assert len(match.solvers) == 9 and match.note
    assert match.solvers[0].name == "euler" and match.solvers[-1].name == "dpmpp_2m"
    assert torch.isfinite(drawn(model, schedule, steps=9)).all()


def test_stochastic_solvers_of_a_schedule_draw_by_the_seed(files):
    model = plain(files, SD15)
    schedule = schedule_of(model, MIXED)
    assert torch.equal(drawn(model, schedule), drawn(model, schedule))
    assert not torch.equal(drawn(model, schedule), drawn(model, schedule, seed=SEED + 1))


@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_what_was_learned_of_each_step_is_run_by_the_sampler(small, files, caplog):
    """Correctors and c_1, in the graph's own sampler: equal to the core's, and no Euler's picture."""
    model, positive = plain(files, small), conditioning(small)
    learned = (
        core.StepSolver("euler", {"corrector": 1.0}),
        core.StepSolver("res_multistep", {"corrector": 1.0, "c_1": 0.8}),
        core.StepSolver("lms_2", {"c_1": 1.2}),
        core.StepSolver("lms_2"),
    )
    schedule = schedule_of(model, learned)
    schedule = schedules.QSchedule.from_json(schedule.to_json())
    found = drawn(model, schedule, small, "as learned", mode="strict")
    assert not caplog.text
    latent = torch.zeros(small.latent)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        base = model.inner_model.inner_model
        info = sampling.solver_info(base.model_sampling, base.model_config)
        return solvers.sample_steps(
            schedule.trajectory.bind(info), model, x, sigmas, extra_args,
            correction=schedule.correction,
        )  # fmt: skip

    wanted = comfy_sample.sample_custom(
        model, comfy_sample.prepare_noise(latent, SEED), 1.0, samplers.KSAMPLER(sample),
        torch.tensor(schedule.sigmas), positive, positive, latent, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, drawn(model, schedule_of(model, named("euler")), small))
    uniform = schedule_of(model, (core.StepSolver("euler", {"corrector": 1.0}),))
    corrected = drawn(model, uniform, small, "as learned", mode="strict")
    assert not torch.allclose(corrected, drawn(model, schedule_of(model, named("euler")), small))


def test_options_of_a_schedule_of_several_solvers_are_its_own(files, caplog):
    model = plain(files, SD15)
    found = drawn(model, schedule_of(model, HALVES), solver="tcd", mode="strict", gamma=1.0)
    assert torch.equal(found, drawn(model, schedule_of(model, HALVES), solver="tcd", gamma=0.0))
    assert not caplog.text


def test_around_a_sampler_a_schedule_of_several_solvers_is_taken(files):
    draw = with_cfg(files)
    around = sampling.make_around_sampler(
        schedule_of(draw.model, MIXED), samplers.sampler_object("euler"), "interpolate"
    )
    assert torch.isfinite(draw(around)).all()


@pytest.mark.parametrize("identity", [False, True])
def test_noise_levels_of_the_other_kind_of_model_are_not_sampled(identity, files):
    learned, other = plain(files, FLUX_SCHNELL), plain(files, SD15)
    ones = corrections.ScalarCorrection.identity(STEPS) if identity else None
    schedule = schedule_of(learned, (core.StepSolver("euler"),), ones)
    with pytest.raises(schedules.ScheduleError, match="learned for a flow model but this is an"):
        drawn(other, schedule, scheduler="as learned")


def test_an_evaluation_says_what_the_schedule_was_learned_for(files, caplog):
    model = plain(files, SD15)
    source = SimpleNamespace(
        model=model, trajectory=trajectories.trajectory_of(model, "euler", "simple", STEPS)
    )
    schedule = schedule_of(model, MIXED)
    candidate, note = evaluation.scheduled_on(schedule, source)
    assert candidate.correction == schedule.correction
    assert [step.name for step in candidate.trajectory.solvers] == [step.name for step in MIXED]
    assert not note and not caplog.text
    assert not evaluation.scheduled_on(schedule_of(model, (core.StepSolver("euler"),)), source)[1]
    flow = schedule_of(plain(files, FLUX_SCHNELL), (core.StepSolver("euler"),))
    with pytest.raises(schedules.ScheduleError, match="learned for a flow model"):
        evaluation.scheduled_on(flow, source)


def test_version_2_goes_through_text_picture_and_edit(files, monkeypatch):
    monkeypatch.setattr(sharing.ui, "PreviewImage", lambda *a, **k: SimpleNamespace(as_dict=dict))
    monkeypatch.setattr(
        sharing.QSchedShowSchedule, "hidden", SimpleNamespace(unique_id=None), raising=False
    )
    schedule = schedule_of(plain(files, SD15), MIXED)
    image, text, summary = sharing.QSchedShowSchedule.execute(schedule).args
    assert json.loads(text)["version"] == 2 and "euler+tcd+dpmpp_2m" in summary
    assert image.shape[-1] == 3 and image.std() > 0.01
    assert sharing.QSchedScheduleFromText.validate_inputs(text) is True
    (again,) = sharing.QSchedScheduleFromText.execute(text).args
    assert again == schedule
    (edited,) = schedule_nodes.QSchedEditSchedule.execute(
        again, step=2, mode="add", c_x=0.01, c_eps=0.0
    ).args
    assert edited.trajectory == schedule.trajectory and edited.correction.c_x[1] == C_X[1] + 0.01
    assert schedules.QSchedule.from_json(edited.to_json()) == edited
    newer = json.dumps(json.loads(text) | {"version": 3})
    assert "reads versions 1 and 2" in sharing.QSchedScheduleFromText.validate_inputs(newer)


class Encoder:
    """A CLIP and a VAE as far as their hashes go."""

    def __init__(self):
        self.model = self.first_stage_model = torch.nn.Linear(2, 2)
        self.patcher, self.patches, self.backup, self.hook_backup = self, {}, {}, {}


@pytest.mark.parametrize(
    ("solver", "given", "options"),
    [
        ("euler", {}, {}),
        ("euler_ancestral", {}, {"options": {"eta": 1.0}}),
        ("tcd", {"gamma": 0.5}, {"options": {"gamma": 0.5}}),
    ],
)
def test_a_source_says_what_studies_of_earlier_versions_say(solver, given, options, files):
    """The name of a study is a hash of this: what is added or left out begins every study anew."""
    model, encoder = plain(files, SD15), Encoder()
    trajectory = trajectories.trajectory_of(model, solver, "simple", STEPS, given)
    found = sources.ComfySource(
        model, encoder, encoder, trajectory, negative="no", width=64, height=32
    ).describe()
    assert list(found) == ["model", "clip_hash", "vae_hash", "sampling"]
    assert found["clip_hash"] == found["vae_hash"]
    assert set(found["model"]) == {
        "source", "source_hash", "format", "layers", "backend", "compute_dtype", "weight_bytes",
        "unquantized_bytes", "patches",
    }  # fmt: skip
    assert found["sampling"] == {
        "solver": solver, "sigmas": list(trajectory.sigmas), "cfg": 1.0, "negative": "no",
        "width": 64, "height": 32, **options,
    }  # fmt: skip
