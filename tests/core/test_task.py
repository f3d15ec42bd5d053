"""A plain-torch task: found by name, run in batches, its mistakes named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import plain_task
import pytest
import torch

from qsched_core.calibration.precheck import compared
from qsched_core.correction import ScalarCorrection
from qsched_core.prompts import PromptSet
from qsched_core.solvers import ModelInfo
from qsched_core.source import SourceError, in_levels
from qsched_core.task import Task, TaskError, TaskSource, load_task
from qsched_core.trajectory import Candidate, rollout

FILE = Path(plain_task.__file__)
PROMPTS = PromptSet(tuple(f"thing {i}" for i in range(5)), tuple(range(5)))


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("most", [1, 3, 16])
def test_every_picture_is_what_the_solver_gives_it_alone(solver, most):
    task = replace(plain_task.quantized("cpu"), solver=solver, max_batch=most)
    corrections = [
        ScalarCorrection.identity(3),
        ScalarCorrection((1.0, 1.02, 1.0), (0.9, 1.0, 1.0)),
    ]
    candidates = [Candidate(task.trajectory, correction) for correction in corrections]
    source = TaskSource(task)
    made = source.images(PROMPTS, candidates)
    assert made.shape == (2, 5, 32, 32, 3)
    for c, candidate in enumerate(candidates):
        for i, (prompt, seed) in enumerate(zip(PROMPTS.prompts, PROMPTS.seeds, strict=True)):
            alone = rollout(
                task.denoise, task.initial([seed]), torch.tensor(task.sigmas), [candidate],
                info=task.info, seeds=[seed], extra_args=task.condition([prompt]),
            )  # fmt: skip
            torch.testing.assert_close(made[c, i], in_levels(task.decode(alone.latents[0]))[0])
    # three steps; the first is shared
    assert source.nfe == 5 + 2 * 5 * 2


def test_a_task_is_found_by_module_and_by_file(monkeypatch):
    assert load_task(f"{FILE}:quantized").provenance["model"] == "quantized"
    monkeypatch.syspath_prepend(FILE.parent)
    assert isinstance(load_task("plain_task:full", "cpu"), Task)


@pytest.mark.parametrize(
    "spec,reason",
    [
        ("plain_task", "must be module:function"),
        ("nowhere.py:task", "no file nowhere.py"),
        ("no_such_module_here:task", "no module 'no_such_module_here'"),
        (f"{FILE}:nothing", "no function 'nothing'"),
        (f"{FILE}:SIZE", "no function 'SIZE'"),
        (f"{FILE}:broken", "gave str; return"),
        (f"{FILE}:without_device", "one argument, the device"),
    ],
)
def test_what_is_no_task_is_named(spec, reason):
    with pytest.raises(TaskError, match=reason):
        load_task(spec)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"sigmas": (0.3, 1.0, 0.0)}, "can't be sampled"),
        ({"sigmas": ()}, "can't be sampled"),
        ({"solver": "heun"}, "heun"),
        ({"options": {"eta": 1.0}}, "eta=1.0"),
        ({"provenance": {}}, "provenance is empty"),
    ],
)
def test_a_task_that_can_t_be_run_is_refused(change, reason):
    with pytest.raises(TaskError, match=reason):
        replace(plain_task.quantized("cpu"), **change)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"height": 16}, r"decoding gave \[5, 32, 32, 3\]; \[5, 16, 32, 3\]"),
        ({"initial": lambda seeds: plain_task.initial(seeds[:1])}, "1 latents for 5 seeds"),
    ],
)
def test_shapes_that_don_t_fit_are_named(change, reason):
    task = replace(plain_task.quantized("cpu"), **change)
    with pytest.raises(SourceError, match=reason):
        TaskSource(task).images(PROMPTS, [Candidate.identity(task.trajectory)])


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde"])
def test_two_models_are_compared_step_by_step_along_the_references_way(solver):
    """This task's quantized velocity is a fixed share of the reference's: scalars remove it all."""
    sources = [
        TaskSource(replace(task("cpu"), solver=solver, info=ModelInfo(True, first_sigma=0.9999)))
        for task in (plain_task.quantized, plain_task.full)
    ]
    exact = sources[1].observed(PROMPTS)
    assert len(exact.latents) == len(exact.outputs) == 3
    assert exact.sigmas == pytest.approx(sources[0].trajectory.sigmas[:-1], abs=1e-3)
    again = sources[0].observed(PROMPTS, exact)
    assert all(torch.equal(a, b) for a, b in zip(again.latents, exact.latents, strict=True))
    found = compared(*sources, PROMPTS)
    along = 5 if solver == "dpmpp_sde" else 3  # its last step has one evaluation
    assert found.prompts == 5 and found.nfe == (along + 3) * 5
    assert found.total == pytest.approx(1, abs=1e-5)
    assert all(error > 0.05 for error in found.error)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_sde"])
def test_the_compared_trajectory_has_the_pictures_own_noise(solver):
    """It depends on neither torch's global seed nor on the prompts beside, as in a rollout."""
    info = ModelInfo(True, first_sigma=0.9999)
    task = replace(plain_task.full("cpu"), solver=solver, info=info)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen.append(TaskSource(task).observed(PROMPTS).latents)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    alone = TaskSource(task).observed(PROMPTS.part(2, 3)).latents
    for many, one in zip(seen[0], alone, strict=True):
        torch.testing.assert_close(many[2:3], one)
    sampled = []

    def denoise(x, sigma, target):
        sampled.append(x)
        return task.denoise(x, sigma, target)

    TaskSource(replace(task, denoise=denoise)).images(
        PROMPTS, [Candidate.identity(task.trajectory)]
    )
    for latents in seen[0]:
        assert any(torch.allclose(latents, x, atol=1e-6) for x in sampled)
