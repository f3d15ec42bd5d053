"""Weights that ComfyUI writes to in place: LoRAs as hooks on the conditioning do, while it samples."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch
from inside import (
    ALL,
    DISTANCE,
    Request,
    comfy_sample,
    loading,
    relative,
    same_state,
    state_bytes,
    with_lora,
)

MappedFile = importlib.import_module("qsched_pack.qsched_core.formats.files").MappedFile
model_patcher = importlib.import_module("comfy.model_patcher")
hooks = importlib.import_module("comfy.hooks")
sampling = importlib.import_module("qsched_pack.nodes.host.sampling")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")


def mapped(model) -> list[str]:
    """The tensors of the model that still lie in a file's read-only mapping."""
    files = [o for o in gc.get_objects() if type(o) is MappedFile]
    module, found = model.model.diffusion_model, []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts = [tensor.data]
        if isinstance(tensor.data, loading.QuantizedTensor):
            params = tensor.data._params
            parts = [tensor.data._qdata, *(getattr(params, n) for n in params._tensor_fields())]
        found += [name for part in parts for file in files if file.owns(part)]
    assert files, "or the check would be empty"
    return found


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_no_weight_lies_in_the_file(name, dynamic, file, sample, tmp_path, monkeypatch):
    """ComfyUI's dynamic loading takes the tensors of the file as they are, instead of copying."""
    path = str(tmp_path / "saved.safetensors")
    saving.save_model(loading.load_diffusion_model(file, Request(name)), path)
    monkeypatch.setattr(model_patcher.ModelPatcher, "is_dynamic", lambda self: dynamic)
    plainly = loading.load_diffusion_model(file, Request(name, "*mlp*=keep"))
    saved = loading.load_diffusion_model(path, Request(name))
    monkeypatch.undo()
    keep = [loading.read_file(p, name, "") for p in (file, path)]
    assert keep and mapped(plainly) == [] and mapped(saved) == []
    assert torch.isfinite(sample(plainly)).all() and torch.isfinite(sample(saved)).all()


@ALL
def test_hook_loras_do_what_they_do_to_the_unquantized_model(name, loaded, plain, sample, hooked):
    model = loaded(name)
    bare, stored = sample(model), state_bytes(model)
    wanted = hooked(plain)
    assert relative(hooked(plain, 0.0), wanted) > 0.3, "the LoRA matters"
    found = hooked(model)
    assert relative(found, wanted) < 3 * DISTANCE[name]
    assert torch.equal(hooked(model), found)
    assert same_state(state_bytes(model), stored), "the hooks leave nothing behind"
    assert torch.equal(sample(model), bare)


def test_keyframes_change_a_hook_while_it_samples(loaded, plain, hooked):
    model = loaded("nf4")
    wanted = hooked(plain, keyframes=True)
    assert relative(hooked(plain), wanted) > 0.1
    assert relative(hooked(model, keyframes=True), wanted) < 3 * DISTANCE["nf4"]


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_hook_adds_to_a_lora_that_is_baked(name, loaded, plain, lora, sample, hooked):
    """Both LoRAs count, and both are gone afterwards."""
    model = loaded(name)
    bare, baked, wanted = sample(model), with_lora(model, lora), hooked(with_lora(plain, lora))
    assert relative(hooked(plain), wanted) > 0.3
    assert relative(hooked(baked), wanted) < 3 * DISTANCE[name]
    assert torch.equal(sample(model), bare)


@pytest.mark.parametrize("name", ["nf4", "int8", "int2"])
def test_hooks_on_a_saved_model(name, loaded, plain, sample, hooked, tmp_path):
    """Its source is not at hand: what is added is rounded so that it survives in the mean."""
    saving.save_model(loaded(name), tmp_path / "a.safetensors")
    model = loading.load_diffusion_model(str(tmp_path / "a.safetensors"), Request(name))
    bare, stored = sample(model), state_bytes(model)
    assert relative(hooked(model), hooked(plain)) < 4 * DISTANCE[name]
    assert same_state(state_bytes(model), stored)
    assert torch.equal(sample(model), bare)


def test_a_strict_schedule_wants_the_loras_it_was_learned_with(loaded, lora, conditioning):
    """Merged into the weights or on top of them; the same LoRA at another strength is another."""
    model = loaded("nf4")
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)
    sigmas = torch.tensor(trajectory.sigmas)
    correction = corrections.ScalarCorrection((0.9, 0.9), (1.1, 1.1))

    def draw(learned, used):
        provenance = {"model": loading.model_info(learned)}
        schedule = schedules.QSchedule(trajectory, correction, provenance)
        empty = torch.zeros(1, 16, 12, 12)
        noise = comfy_sample.prepare_noise(empty, 3)
        sampler = sampling.make_sampler(schedule, "euler", "strict", None)
        return comfy_sample.sample_custom(
            used, noise, 1.0, sampler, sigmas, conditioning, conditioning, empty,
            disable_pbar=True, seed=3,
        )  # fmt: skip

    first, weaker = with_lora(model, lora), with_lora(model, lora, 0.5)
    merged = loading.merge_patches(first)
    for learned, used in ((model, model), (first, with_lora(model, lora)), (first, merged)):
        assert torch.isfinite(draw(learned, used)).all()
    for learned, used in ((model, first), (first, model), (first, weaker), (merged, weaker)):
        with pytest.raises(schedules.ScheduleError, match=r"LoRAs (none|\w{8}), not (none|\w{8})"):
            draw(learned, used)
