"""Calibrated weights inside the real ComfyUI: rounded, sampled, patched, saved and loaded again."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import inside
import pytest
import safetensors
import torch
from families import FLUX_SCHNELL as WHOLE
from families import FLUX_WIDTH, SD15
from graphs import conditioning, drawing
from inside import Request, comfy_sd, loading, relative, same_state, state_bytes, with_lora
from torch import nn

from benchmarks import _families as real

calibrated = importlib.import_module("qsched_pack.nodes.host.weights.calibrated")
loras = importlib.import_module("qsched_pack.nodes.host.weights.loras")
provenance = importlib.import_module("qsched_pack.nodes.host.weights.provenance")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")
sources = importlib.import_module("qsched_pack.nodes.host.source")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
core = importlib.import_module("qsched_pack.qsched_core")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
rounding = importlib.import_module("qsched_pack.qsched_core.rounding")
chart = importlib.import_module("qsched_pack.qsched_core.formats.chart")
table = importlib.import_module("qsched_pack.qsched_core.formats.report").table

# One block of each kind.
FLUX_SCHNELL = replace(
    WHOLE,
    family=real.FLUX_SCHNELL.smaller(
        "flux_two_blocks", **{**FLUX_WIDTH, "depth": 1, "depth_single_blocks": 1}
    ),
)


class Words:
    """A text encoder in two methods; prompts are numbers."""

    def __init__(self, small):
        self.small = small
        self.cond_stage_model = nn.Identity()

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(self.small, int(tokens or 0))


class Pictures:
    """A VAE without weights: the first three channels."""

    first_stage_model = nn.Identity()
    device = torch.device("cpu")

    def decode(self, latents):
        return (
            latents[:, :3].movedim(1, -1).sigmoid().repeat_interleave(8, 1).repeat_interleave(8, 2)
        )


PROMPTS = prompt_sets.CalibrationPrompts.of(
    [str(i) for i in range(6)], [str(i) for i in range(20, 30)]
)


@pytest.fixture(autouse=True)
def hashes(monkeypatch):
    monkeypatch.setattr(sources, "clip_hash", lambda clip: "words")


def subject_of(model, small, name="int3", layers="", cfg=1.0):
    def source(of):
        trajectory = trajectories.trajectory_of(of, "euler", "simple", 2)
        return sources.ComfySource(
            of, Words(small), Pictures(), trajectory, width=96, height=96, memory=0, cfg=cfg
        )

    return calibrated.ComfySubject(source(model), Request(name, layers), source)


def made(model, small, folder, name="int3", **more):
    subject = subject_of(model, small, name, **more)
    result = rounding.calibrate_weights(subject, PROMPTS, subject.request.policy, folder)
    return subject, result, subject.with_weights(result.weights)


@pytest.fixture(scope="module")
def flux(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "clip_hash", lambda clip: "words")
        return made(files(FLUX_SCHNELL), FLUX_SCHNELL, tmp_path_factory.mktemp("rounding"))


def sampled(model, small=FLUX_SCHNELL):
    return drawing(model, conditioning(small, 50), shape=small.latent)(
        importlib.import_module("comfy.samplers").sampler_object("euler")
    )


def test_the_walk_goes_through_comfyuis_own_model(flux, files):
    subject, result, model = flux
    proof = result.proof
    assert result.calibrated and proof.calibrated.mean < 0.8 * proof.plain.mean
    inside_blocks = [n for n in result.weights.layers if "blocks" in n]
    assert len(inside_blocks) > 9
    assert all(result.weights.layers[n].errors is not None for n in inside_blocks)
    # The MODEL is what was proven, and the unquantized one is as it was.
    reference = sampled(files(FLUX_SCHNELL))
    plain = sampled(loading.quantize_model(files(FLUX_SCHNELL), subject.request))
    assert relative(sampled(model), reference) < relative(plain, reference)
    assert not any("forward" in m.__dict__ for m in subject.module.modules())


def test_a_saved_file_is_the_same_model_and_says_what_it_is(flux, tmp_path):
    _, result, model = flux
    path, told = saving.save_model(model, tmp_path / "saved.safetensors")
    again = loading.load_diffusion_model(str(path), Request("int3"))
    assert same_state(state_bytes(again), state_bytes(model))
    assert torch.equal(sampled(again), sampled(model))
    with safetensors.safe_open(path, framework="pt") as opened:
        stored = json.loads(opened.metadata()["qsched"])
    facts = stored["rounding"]
    assert facts["digest"] == result.weights.digest
    assert facts["prompts"] == PROMPTS.calibration.hash
    assert facts["heldout"] == PROMPTS.heldout.hash
    assert facts["proof"] == json.loads(json.dumps(result.proof.to_dict()))
    assert (facts["states"], facts["evaluations"]) == (12, 12)
    one, other = provenance.model_info(model), provenance.model_info(again)
    assert one["rounding"] == told["rounding"] == other["rounding"]
    # the same weights before quantization, and another model than the plainly rounded one
    subject = flux[0]
    plain = provenance.model_info(loading.quantize_model(subject.model, subject.request))
    assert one["source_hash"] == plain["source_hash"] and one != plain
    rows = provenance.layer_rows(again.model.diffusion_model)
    mine = provenance.layer_rows(model.model.diffusion_model)
    errors = [r.calibrated for r in rows if r.calibrated]
    for saved, own in zip(rows, mine, strict=True):
        assert saved.calibrated == (own.calibrated and pytest.approx(own.calibrated, abs=1e-6))
    assert len(errors) == facts["calibrated_layers"] and all(b <= a for a, b in errors)
    assert "calibrated: output error" in table(rows)
    assert chart.draw(rows, "x").height > chart.draw([], "x").height
    assert f"calibrated: {len(errors)} layers; distance" in provenance.describe(told)


def lora_for(model, rank=4):
    random = torch.Generator().manual_seed(3)
    found = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if "blocks" in name and isinstance(layer, nn.Linear) and "mlp" not in name:
            for side, shape in (
                ("A", (rank, layer.in_features)),
                ("B", (layer.out_features, rank)),
            ):
                draw = torch.randn(shape, generator=random) * 0.1
                found[f"diffusion_model.{name}.lora_{side}.weight"] = draw
    return found


def test_a_lora_is_added_at_run_time_and_leaves_no_trace(flux, files):
    model = flux[2]
    before, picture = state_bytes(model), sampled(model)
    lora = lora_for(files(FLUX_SCHNELL))
    patched = with_lora(model, lora)
    with_patch = sampled(patched)
    assert same_state(state_bytes(model), before)  # nothing was rounded again
    assert torch.equal(sampled(model), picture)
    assert same_state(state_bytes(model), before)
    # It is what the dequantized weight plus the LoRA gives.
    reference = sampled(with_lora(files(FLUX_SCHNELL), lora))
    plainly = relative(picture, sampled(files(FLUX_SCHNELL)))
    assert relative(with_patch, reference) < 1.5 * plainly + 0.02
    assert relative(with_patch, picture) > 0.05  # it does something
    double = with_lora(patched, lora)
    assert not torch.equal(sampled(double), with_patch)
    assert torch.equal(sampled(patched), with_patch)


def test_part_of_the_model_offloaded_gets_a_lora_once(flux, files):
    """ComfyUI adds its own patch to what it offloads from a loaded model."""
    patched = with_lora(flux[2], lora_for(files(FLUX_SCHNELL)))
    whole = sampled(patched)
    management = inside.management
    management.load_models_gpu([patched])
    patched.partially_unload(patched.offload_device, patched.model_size() // 2)
    functions = [
        layer.weight_function
        for name, layer in patched.model.named_modules()
        if f"{name}.weight" in patched.patches
    ]
    assert any(len(found) == 2 for found in functions), "some are offloaded"
    for layer in patched.model.modules():
        found = getattr(layer, "weight_function", [])
        if len(found) == 2:
            ours = next(f for f in found if isinstance(f, loras.RunTimePatch))
            weight = torch.zeros(layer.weight.shape)
            assert ours(weight) is weight
        elif found:
            assert isinstance(found[0], loras.RunTimePatch)
    torch.testing.assert_close(sampled(patched), whole, rtol=1e-3, atol=1e-3)


def test_a_lora_can_be_merged_into_the_file(flux, files, tmp_path):
    lora = lora_for(files(FLUX_SCHNELL))
    patched, before = with_lora(flux[2], lora), state_bytes(flux[2])
    path, told = saving.save_model(patched, tmp_path / "merged.safetensors")
    again = loading.load_diffusion_model(str(path), Request("int3"))
    reference = sampled(with_lora(files(FLUX_SCHNELL), lora))
    assert relative(sampled(again), reference) < 0.7 * relative(sampled(flux[2]), reference)
    assert told["rounding"]["rounded_again"] == len(lora) // 2
    assert "lost their calibration" in provenance.describe(told)
    assert relative(sampled(patched), reference) < relative(sampled(again), reference)
    assert same_state(state_bytes(flux[2]), before)
    kept = {r.name for r in provenance.layer_rows(again.model.diffusion_model) if r.calibrated}
    changed = {key.split(".lora_")[0].removeprefix("diffusion_model.") for key in lora}
    assert not kept & changed and kept


def test_a_lora_on_the_unquantized_model_is_rounded_with_it(files, tmp_path):
    lora = lora_for(files(FLUX_SCHNELL))
    model = with_lora(files(FLUX_SCHNELL), lora)
    _, result, found = made(model, FLUX_SCHNELL, tmp_path)
    assert result.calibrated
    rounded = {f"diffusion_model.{name}.weight" for name in result.weights.layers}
    assert not rounded & found.patches.keys()
    assert provenance.model_info(found)["merged_patches"] == provenance.patches_hash(model)
    reference = sampled(with_lora(files(FLUX_SCHNELL), lora))
    plain = sampled(loading.quantize_model(model, Request("int3")))
    assert relative(sampled(found), reference) < relative(plain, reference)


def test_a_stopped_walk_goes_on_in_a_new_process_state(flux, files, tmp_path):
    whole = flux[1]
    subject = subject_of(files(FLUX_SCHNELL), FLUX_SCHNELL)
    policy = subject.request.policy

    class Stop(BaseException):
        pass

    def stop(done):
        if done.index == 0:
            raise Stop

    with pytest.raises(Stop):
        rounding.calibrate_weights(subject, PROMPTS, policy, tmp_path, on_block=stop)
    told = []
    subject = subject_of(files(FLUX_SCHNELL), FLUX_SCHNELL)
    again = rounding.calibrate_weights(subject, PROMPTS, policy, tmp_path, on_block=told.append)
    assert [done.resumed for done in told] == [True, False]
    assert again.weights.digest == whole.weights.digest


def test_guidance_gives_states_of_the_negative_prompt_too(files, tmp_path):
    subject = subject_of(files(SD15), SD15, cfg=3.0)
    states = subject.states(PROMPTS.calibration, 1, 0)
    assert len(states) == 2 * len(PROMPTS.calibration)
    for part in states.parts(4):
        states.run(part)


def test_a_quantized_model_is_refused(files):
    model = loading.quantize_model(files(SD15), Request("int8"))
    with pytest.raises(inside.formats.FormatError, match="model is quantized already"):
        subject_of(model, SD15)


@pytest.mark.parametrize("name", ["int8_convrot", pytest.param("w4a4", marks=pytest.mark.full)])
def test_a_native_file_opens_in_plain_comfyui(name, files, tmp_path):
    _, result, model = made(files(FLUX_SCHNELL), FLUX_SCHNELL, tmp_path / "walk", name)
    path, told = saving.save_model(model, tmp_path / "saved.safetensors")
    assert told["kind"] == "native" and result.bits < 8.5
    core = comfy_sd.load_diffusion_model(str(path))
    bound = {"int8_convrot": 0.02, "w4a4": 0.3}[name]
    assert relative(sampled(core), sampled(model)) < bound
    reference = sampled(files(FLUX_SCHNELL))
    plain = sampled(loading.quantize_model(files(FLUX_SCHNELL), Request(name)))
    if name == "w4a4":
        assert result.calibrated
        assert relative(sampled(core), reference) < relative(plain, reference)
