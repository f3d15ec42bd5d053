"""The walk through a model: what it finds out and what it promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import rounding_task
import torch
from rounding_cases import INT2, PROMPTS, Brightness, states_of
from torch import nn

from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import (
    GRIDS,
    RoundingError,
    RoundingSettings,
    TaskSubject,
    calibrate_module,
    calibrate_weights,
    choices,
    quantized,
)
from qsched_core.rounding.blocks import blocks_of, stages_of
from qsched_core.rounding.proof import final_latents
from qsched_core.task import TaskError, TaskSource
from qsched_core.trajectory import Candidate


def test_blocks_and_who_uses_their_outputs_are_found(task, states):
    blocks = blocks_of(task.module, lambda: states.run(slice(0, 1)))
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.last_use for block in blocks] == [2, 2, 2]


def test_layers_fall_into_stages_by_what_their_inputs_depend_on(task, states):
    layers = dict(task.module.blocks[1].named_children())
    stages = stages_of(layers, lambda: states.run(slice(0, 1)))
    assert stages == [{"q": 1, "k": 1}, {"proj": 1}]


def test_the_walk_leaves_the_model_as_it_is_and_names_what_it_rounds_plainly(task, states):
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    found = calibrate_module(task.module, states, INT2)
    notes = {name: layer.note for name, layer in found.items() if layer.note}
    assert notes == {
        "first": "it is outside of the blocks and does not run just once",
        **{f"blocks.{k}.unused": "it does not run" for k in range(3)},
    }
    assert all(torch.equal(before[n], t) for n, t in task.module.state_dict().items())
    assert not any("forward" in module.__dict__ for module in task.module.modules())
    assert all(not module._forward_hooks for module in task.module.modules())


def test_a_layers_statistics_are_those_of_the_model_so_far(task, states, monkeypatch):
    """The quantized stream at the last block is what a model with the earlier blocks rounded gives."""
    from qsched_core.rounding import walk

    seen = {}
    real = walk.calibrate_layer

    def watched(grid, weight, bias, moments, *rest, **more):
        seen[len(seen)] = moments[0].copied()
        return real(grid, weight, bias, moments, *rest, **more)

    monkeypatch.setattr(walk, "calibrate_layer", watched)
    found = calibrate_module(task.module, states, INT2)
    inputs = []
    last = task.module.blocks[2]
    earlier = {n: layer for n, layer in found.items() if not n.startswith("blocks.2")}
    with quantized(task.module, earlier, choices(task.module, INT2)):
        hook = last.q.register_forward_pre_hook(lambda m, a: inputs.append(a[0].clone()))
        for start in range(0, len(states), states.batch):
            states.run(slice(start, start + states.batch))
        hook.remove()
    x = torch.cat(inputs).flatten(0, 1).double()
    torch.testing.assert_close(seen[6].h, x.t() @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_the_model_comes_nearer_to_the_unquantized_one(tmp_path, task, name):
    policy = Policy(name, parse_overrides("first=keep"))
    result = calibrate_weights(TaskSubject(task), PROMPTS, policy, tmp_path)
    fine = name in ("int8", "int8_convrot")
    # A millionth of the weights moves int8's by a tenth; half of svdquant's rank is the whole here.
    bound = {"int8": 1.15, "int8_convrot": 1.02, "svdquant_w4a4": 0.8}.get(name, 0.7)
    assert result.proof.calibrated.mean < bound * result.proof.plain.mean
    if not fine:
        assert result.calibrated and result.proof.holds
    assert result.proof.to_dict()["prompts"] == 24
    assert result.evaluations == len(PROMPTS.calibration) * 2


def test_without_a_gain_on_heldout_prompts_plain_rounding_is_kept(tmp_path, task, monkeypatch):
    """Calibrated on one prompt with hardly any damping, weights fit that prompt alone."""
    few = CalibrationPrompts.of(["thing"], [f"other {i}" for i in range(24)])
    settings = RoundingSettings(damp=1e-6, target_damp=1e-6)
    result = calibrate_weights(
        TaskSubject(task), few, INT2, tmp_path, settings=settings, states_per_prompt=1
    )
    assert not result.calibrated and result.proof.change.mean > 0
    weights = result.weights
    with quantized(task.module, weights.layers, weights.chosen):
        kept = final_latents(TaskSource(task, 0), PROMPTS.heldout)
    expected = rounding_task.task()
    from qsched_core.formats.module import quantize_module

    quantize_module(expected.module, INT2)
    torch.testing.assert_close(kept, final_latents(TaskSource(expected, 0), PROMPTS.heldout))


def test_pictures_are_scored_where_there_is_a_measure(tmp_path, task):
    proof = calibrate_weights(
        TaskSubject(task), PROMPTS, INT2, tmp_path, measure=Brightness()
    ).proof
    source = TaskSource(task)
    identity = Candidate.identity(task.trajectory)
    pictures = source.images(PROMPTS.heldout, [identity])[0]
    assert proof.reference_jaq == pytest.approx(pictures.mean((1, 2, 3)).tolist())
    assert len(proof.calibrated.jaq) == 24 and proof.plain.jaq != proof.calibrated.jaq
    assert proof.to_dict()["jaq"]["gain"] == proof.gain.to_dict()


def test_sampling_goes_on_in_smaller_batches_where_memory_runs_out(tmp_path, task):
    """The same states and the same proof, up to the rounding of batched products."""
    whole = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "whole")
    real = task.denoise

    def scarce(x, sigma, **extra):
        if len(x) > 3:
            raise torch.OutOfMemoryError("no memory")
        return real(x, sigma, **extra)

    found = calibrate_weights(
        TaskSubject(replace(task, denoise=scarce)), PROMPTS, INT2, tmp_path / "scarce"
    )
    assert found.weights.provenance["states"] == whole.weights.provenance["states"]
    assert found.proof.plain.distance == pytest.approx(whole.proof.plain.distance, rel=1e-3)
    assert found.proof.calibrated.mean == pytest.approx(whole.proof.calibrated.mean, rel=0.2)
    one = replace(
        task, denoise=lambda x, sigma, cond: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises(torch.OutOfMemoryError):
        calibrate_weights(TaskSubject(one), PROMPTS, INT2, tmp_path / "none")


def test_samples_are_the_worst_the_median_and_the_best_prompt(tmp_path, task):
    found = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path, samples=True)
    changes = [sample.change for sample in found.samples]
    assert changes == sorted(changes, reverse=True) and len(changes) == 3
    pairs = zip(found.proof.plain.distance, found.proof.calibrated.distance, strict=True)
    assert changes[0] == max(after - before for before, after in pairs)
    source, sample = TaskSource(task, 0), found.samples[1]
    row = PROMPTS.heldout.prompts.index(sample.prompt)
    identity = [Candidate.identity(task.trajectory)]
    expected = source.images(PROMPTS.heldout.part(row, row + 1), identity)[0, 0]
    assert (sample.pictures[0].float() / 255 - expected).abs().max() <= 1 / 255


def test_nan_names_the_layer(task, states):
    with torch.no_grad():
        task.module.blocks[1].proj.weight[0, 0] = torch.nan
    with pytest.raises(FormatError, match=r"layer blocks\.1\.proj.*NaN"):
        calibrate_module(task.module, states, INT2)
    with pytest.raises(RoundingError, match=r"layer blocks\.1\.proj gives NaN"):
        states_of(task)
    task.module.load_state_dict(rounding_task.net().state_dict())
    states._states[3].arguments[0][2][0, 0] = torch.inf  # the condition
    with pytest.raises(RoundingError, match=r"layer blocks\.0\.k: its inputs are NaN or infinite"):
        calibrate_module(task.module, states, INT2)


def test_dead_inputs_are_rounded_plainly_and_listed(task):
    with torch.no_grad():
        task.module.blocks[1].q.weight.zero_()
        task.module.blocks[1].q.bias.zero_()
    found = calibrate_module(task.module, states_of(task), INT2)
    assert found["blocks.1.proj"].note == "its inputs never change"


def test_models_that_cannot_be_walked_are_refused(task, states):
    class Twice(rounding_task.Net):
        def forward(self, x, sigma, cond):
            for block in (*self.blocks, self.blocks[0]):
                x, _ = block(x, cond.unsqueeze(1))
            return x

    other = rounding_task.task(Twice())
    with pytest.raises(RoundingError, match=r"blocks\.0 runs more than once"):
        calibrate_module(other.module, states_of(other), INT2)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(self.layer(x))

    plain = Flat()
    flat = rounding_task.task(plain)
    flat = replace(flat, denoise=lambda x, sigma, cond: plain(x))
    with pytest.raises(RoundingError, match="no blocks"):
        calibrate_module(plain, states_of(flat), INT2)
    with pytest.raises(RoundingError, match="chooses no layer"):
        calibrate_module(task.module, states, Policy("int2", min_weights=10**6))
    with pytest.raises(RoundingError, match="'fp8_e4m3' can't be calibrated"):
        calibrate_module(task.module, states, "fp8_e4m3")
    with pytest.raises(RoundingError, match="module"):
        calibrate_weights(
            TaskSubject(rounding_task.without_module("cpu")), PROMPTS, INT2, Path("nowhere")
        )
    with pytest.raises(TaskError, match="module is str"):
        rounding_task.task(module="net")


def test_a_format_without_a_grid_beside_one_with_is_rounded_plainly(task, states):
    policy = Policy("int2", parse_overrides("proj=llm_int8"))
    found = calibrate_module(task.module, states, policy)
    assert "takes columns out" in found["blocks.0.proj"].note and not found["blocks.0.q"].note


def levels_of(states):
    seen = []
    hook = states.module.register_forward_pre_hook(lambda _, given: seen.extend(given[1].tolist()))
    for part in states.parts(3):
        states.run(part)
    hook.remove()
    return [round(level, 3) for level in seen]


def test_states_are_pairs_of_prompt_and_step(task):
    every = states_of(task)
    some = states_of(task, 1, seed=3)
    assert len(every) == 40 and len(some) == 20
    levels = levels_of(some)
    assert set(levels) == {1.0, 0.6}
    assert levels == levels_of(states_of(task, 1, seed=3)) != levels_of(states_of(task, 1, seed=4))
    random = torch.Generator().manual_seed(3)
    expected = [torch.randperm(2, generator=random)[0].item() for _ in range(20)]
    assert levels == [[1.0, 0.6][step] for step in expected]  # of each prompt its own step
    with pytest.raises(RoundingError, match="states_per_prompt=3 must be 0"):
        states_of(task, 3)
