"""The walk through a model: what it finds out, what it promises, and going on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import rounding_task
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qsched_core.cli import calibrate_weights as command
from qsched_core.files import SPARE_BYTES, DiskError
from qsched_core.formats import get
from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Choice, Policy, parse_overrides
from qsched_core.objective import Scores
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import (
    GRIDS,
    RecordedStates,
    RoundedWeights,
    RoundingError,
    RoundingSettings,
    TaskSubject,
    calibrate_module,
    calibrate_weights,
    choices,
    quantized,
    rounded_plainly,
)
from qsched_core.rounding.blocks import blocks_of, stages_of
from qsched_core.rounding.layer import Calibrated
from qsched_core.rounding.proof import final_latents
from qsched_core.rounding.walk import parameters_in
from qsched_core.study.seal import digest
from qsched_core.task import TaskError, TaskSource
from qsched_core.trajectory import Candidate

FILE = Path(rounding_task.__file__)
ROOT = FILE.parents[2]
INT2 = Policy("int2", parse_overrides("first=int2"))
PROMPTS = CalibrationPrompts.of(
    [f"thing {i}" for i in range(20)], [f"other {i}" for i in range(24)]
)


def states_of(task, per_prompt=0, seed=0):
    return RecordedStates(TaskSource(task, 0), task.module, PROMPTS.calibration, per_prompt, seed)


@pytest.fixture
def task():
    return rounding_task.task()


@pytest.fixture
def states(task):
    return states_of(task)


def same(one, other):
    assert list(one) == list(other)
    for name, layer in one.items():
        found = other[name]
        assert torch.equal(layer.packed.codes, found.packed.codes), name
        for table, data in layer.packed.aux.items():
            assert torch.equal(data.float(), found.packed.aux[table].float()), (name, table)
        assert (layer.bias is None) == (found.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, found.bias), name


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


class Stop(BaseException):
    pass


def stopped_at(index, task, folder, **more):
    """A walk that ends after its block ``index``."""

    def stop(done):
        if done.index == index:
            raise Stop

    with pytest.raises(Stop):
        calibrate_weights(TaskSubject(task), PROMPTS, INT2, folder, on_block=stop, **more)


def test_a_walk_that_was_stopped_goes_on_to_the_same_weights(tmp_path, task):
    whole = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "a")
    stopped_at(1, task, tmp_path / "b")
    told = []
    again = calibrate_weights(
        TaskSubject(task), PROMPTS, INT2, tmp_path / "b", on_block=told.append
    )
    assert [done.resumed for done in told] == [True, True, False]
    same(whole.weights.layers, again.weights.layers)


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, task):
    def never(x, sigma, cond):
        raise AssertionError("the model ran")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        calibrate_weights(
            TaskSubject(replace(task, denoise=never)), PROMPTS, INT2, tmp_path / "file" / "studies"
        )


class Brightness:
    """Scores a picture by its mean."""

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        means = tuple(images.mean((1, 2, 3)).tolist())
        return Scores(means, means, means)

    def describe(self):
        return {}


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


def test_a_disk_without_room_for_the_blocks_is_refused_before_the_walk(tmp_path, task, monkeypatch):
    def called(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(task.module, "forward", called)
    layers = choices(task.module, INT2)
    weights = sum(task.module.get_submodule(name).weight.numel() for name in layers)
    room = type("Usage", (), {"free": SPARE_BYTES + weights // 4})  # 2 bits, but for the scales
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    with pytest.raises(DiskError, match=r"walk can't be written, .* MB free"):
        calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "walk")


def test_a_finished_walk_is_not_repeated(tmp_path, task, monkeypatch, caplog):
    measure = Brightness()
    first = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path, samples=True)
    assert not list(tmp_path.rglob("blocks"))

    def again(**more):
        told = []
        found = calibrate_weights(
            TaskSubject(task), PROMPTS, INT2, tmp_path, on_block=told.append, **more
        )
        assert found.weights.digest == first.weights.digest
        return found, told

    # Another proof of the same weights
    found, told = again(measure=measure)
    assert not told and found.proof.gain is not None and not found.samples
    monkeypatch.setattr(task.module, "forward", None)  # nothing runs
    found, told = again(samples=True)
    assert found.proof == first.proof and found.weights.provenance == first.weights.provenance
    assert len(found.samples) == 3
    for one, other in zip(found.samples, first.samples, strict=True):
        assert one.prompt == other.prompt and torch.equal(one.pictures, other.pictures)
    monkeypatch.undo()
    for path in tmp_path.rglob("proof-*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    found, told = again(samples=True)
    assert not told and found.proof == first.proof and "the proof is made again" in caplog.text
    path = next(tmp_path.rglob("weights.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    found, told = again(samples=True)
    assert len(told) == 3 and "the weights are rounded again" in caplog.text


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


def test_old_walks_go_when_another_begins(tmp_path, task):
    def walk(name, days):
        folder = tmp_path / name
        (folder / "blocks").mkdir(parents=True)
        then = time.time() - 24 * 3600 * days
        for path in (folder / "weights.safetensors", folder / "blocks" / "a"):
            path.write_text("")
            os.utime(path, (then, then))
        for path in (folder / "blocks", folder):
            os.utime(path, (then, then))

    for days in range(5):
        walk(f"rounding-{days}", days + 0.5)
    walk("studies", 9)
    stopped_at(0, task, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir() if len(path.name) < 12)
    assert left == ["rounding-0", "rounding-1", "rounding-2", "studies"]


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


@pytest.mark.parametrize("wound", ["flip", "cut", "empty"])
def test_a_damaged_block_is_named_and_made_again(tmp_path, task, caplog, wound):
    whole = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "whole")
    stopped_at(2, task, tmp_path)
    path = next(tmp_path.rglob("blocks.1.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[wound])
    told = []
    again = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path, on_block=told.append)
    assert [done.resumed for done in told] == [True, False, True]
    assert "blocks.1 is rounded again" in caplog.text
    same(whole.weights.layers, again.weights.layers)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": RoundingSettings(rounds=1)},
        {"states_per_prompt": 1},
        {"seed": 1, "states_per_prompt": 1},
        {"policy": Policy("int3")},
        {"task": "other weights"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_walk_of_anything_else_is_not_gone_on_with(tmp_path, task, change):
    more = {"policy": INT2} | change
    if "task" in more:
        other = rounding_task.net()
        other.blocks[2].proj.bias.data += 1e-3
        more["task"] = rounding_task.task(other)
    told = []
    base = {"states_per_prompt": 1} if "seed" in change else {}
    stopped_at(2, task, tmp_path, **base)
    subject = TaskSubject(more.pop("task", task))
    calibrate_weights(subject, PROMPTS, more.pop("policy"), tmp_path, on_block=told.append, **more)
    assert not any(done.resumed for done in told)


def test_the_file_gives_back_what_was_saved(tmp_path, task):
    result = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path)
    path = result.weights.save(tmp_path / "weights.safetensors")
    again = RoundedWeights.load(path)
    same(result.weights.layers, again.layers)
    assert again.provenance == json.loads(json.dumps(result.weights.provenance))
    assert again.digest == result.weights.digest
    model = again.apply(rounding_task.net())
    with quantized(task.module, result.weights.layers, result.weights.chosen):
        expected = final_latents(TaskSource(task, 0), PROMPTS.heldout)
    assert torch.equal(
        final_latents(TaskSource(rounding_task.task(model), 0), PROMPTS.heldout), expected
    )
    with pytest.raises(RoundingError, match="quantized already"):
        calibrate_weights(TaskSubject(rounding_task.task(model)), PROMPTS, INT2, tmp_path)


def test_a_file_for_another_model_is_refused(tmp_path, task):
    result = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path)
    other = rounding_task.net()
    other.blocks[1].q = nn.Linear(32, 64)
    with pytest.raises(FormatError, match=r"blocks\.1\.q has shape \(64, 32\)"):
        result.weights.apply(other)
    del other.blocks[2]
    other.blocks[1].q = nn.Linear(64, 64)
    with pytest.raises(FormatError, match=r"no layer blocks\.2\.q"):
        result.weights.apply(other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(next(tmp_path.rglob("weights.safetensors")).read_bytes()[:-7])
    with pytest.raises(FormatError, match="cut short"):
        RoundedWeights.load(broken)


def hostile(path, change):
    """The file with its description changed, and the checksum that goes with that."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["qsched_rounding"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = change(content, tensors)
    del content["sum"]
    text = json.dumps({**content, "sum": digest(content)}) if text is None else text
    save_file(tensors, path, {"qsched_rounding": text})


def _shorter(content, tensors):
    tensors["first.scale"] = tensors["first.scale"][:1].clone()


HOSTILE = {
    "layers are a list": lambda c, t: c.update(layers=[1]),
    "a layer is a number": lambda c, t: c["layers"].update(first=1),
    "errors are a text": lambda c, t: c["layers"]["first"].update(errors="ab"),
    "a shape of texts": lambda c, t: c["layers"]["first"].update(shape=["a", "b"]),
    "a shape beyond all": lambda c, t: c["layers"]["first"].update(shape=[2**62, 2**62]),
    "too deep": lambda c, t: "[" * 200_000,
    "a table too short": _shorter,
    "a name that turns": lambda c, t: c["layers"].update({"a\u202eb": {}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error_that_names_it(tmp_path, case):
    form = get("int2")
    packed = form.quantize(torch.randn(8, 64))
    weights = RoundedWeights(
        {"first": Calibrated(packed, None, 0.2, 0.1, "")}, {"first": Choice("int2", True)}
    )
    path = weights.save(tmp_path / "evil.safetensors")
    hostile(path, HOSTILE[case])
    with pytest.raises(
        FormatError, match=r"^evil\.safetensors.*again$|^evil\.safetensors has no"
    ) as error:
        RoundedWeights.load(path)
    assert str(error.value).isprintable() and "checksum" not in str(error.value)


@pytest.mark.parametrize(
    "place", ["provenance", "layers/first/errors", "layers/first/note", "version"]
)
def test_what_a_file_says_of_itself_is_under_its_checksum(tmp_path, place):
    weights = RoundedWeights(
        {"first": Calibrated(get("int2").quantize(torch.randn(8, 64)), None, 0.2, 0.1, "why")},
        {"first": Choice("int2", True)},
        {"format": "int2", "prompts": ("a", "b")},
    )
    path = weights.save(tmp_path / "weights.safetensors")
    assert RoundedWeights.load(path).provenance == {"format": "int2", "prompts": ["a", "b"]}
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["qsched_rounding"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    *owners, name = place.split("/")
    owner = content
    for key in owners:
        owner = owner[key]
    owner[name] = {"provenance": {}, "errors": [0.2, 0.0], "note": "", "version": 1}[name]
    save_file(tensors, path, {"qsched_rounding": json.dumps(content)})
    with pytest.raises(FormatError, match=r"^weights\.safetensors is (damaged|of version 1)"):
        RoundedWeights.load(path)


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


def arguments(folder, name="weights"):
    lists = {
        "calibration": list(PROMPTS.calibration.prompts),
        "heldout": list(PROMPTS.heldout.prompts),
    }
    (folder / "prompts.json").write_text(json.dumps(lists))
    return [
        "--task", f"{FILE}:full", "--prompts", str(folder / "prompts.json"), "--format", "int2",
        "--folder", str(folder / "studies"), "--out", str(folder / f"{name}.safetensors"),
    ]  # fmt: skip


def test_the_command_writes_weights_and_says_what_they_are_worth(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert command.main([*arguments(tmp_path), "--json", str(figures)]) == 0
    told = capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["calibrated"] and content["proof"]["change"]["high"] < 0
    assert f"calibrated {content['proof']['distance']['calibrated']:.5f}" in told
    weights = RoundedWeights.load(tmp_path / "weights.safetensors")
    assert weights.provenance["proof"] == content["proof"]
    for wrong, reason in (
        (["--format", "fp8_e4m3"], "can't be calibrated"),
        (["--damp", "0"], "damp=0.0 must be"),
        (["--task", f"{FILE}:without_module"], "the task has no module"),
    ):
        assert command.main([*arguments(tmp_path, "none"), *wrong]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.full
def test_a_command_that_is_killed_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert command.main(arguments(whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "qsched_core.calibrate_weights", *arguments(killed)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(killed.rglob("blocks.0.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert command.main(arguments(killed)) == 0
    one, other = (RoundedWeights.load(f / "weights.safetensors") for f in (whole, killed))
    same(one.layers, other.layers)


def test_the_demo_task_loads_calibrated_weights(tmp_path, monkeypatch):
    from demo import task as demo

    full = demo.full(torch.device("cpu"))
    policy = Policy("int2", parse_overrides("*=keep; *mlp.fc1=int2"))
    chosen = choices(full.module, policy)
    weights = RoundedWeights(
        rounded_plainly(chosen, partial(parameters_in, full.module)), chosen, {"format": "int2"}
    )
    monkeypatch.setenv(demo.WEIGHTS, str(weights.save(tmp_path / "weights.safetensors")))
    task = demo.calibrated(torch.device("cpu"))
    assert task.provenance["rounding"] == weights.digest
    assert task.provenance["source_hash"] == full.provenance["source_hash"]
    prompts = PROMPTS.heldout.part(0, 2)
    with quantized(full.module, weights.layers, chosen):
        expected = final_latents(TaskSource(full, 0), prompts)
    assert torch.equal(final_latents(TaskSource(task, 0), prompts), expected)
