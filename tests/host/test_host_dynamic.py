"""ComfyUI's dynamic loading, which it has on NVIDIA GPUs unless told otherwise: see simulated_host.py.

Compared with loading whole models to the same GPU, which the other files test.
"""

from __future__ import annotations

import gc
import importlib
import logging
import weakref

import pytest
import torch
from hostpath import comfyui_folder
from inside import (
    DEVICE,
    QUICK,
    Request,
    comfy_sample,
    comfy_sd,
    formats,
    loading,
    management,
    relative,
    same_state,
    save_file,
    state_bytes,
    with_lora,
)
from simulated_host import gpu_host
from small_encoders import SHORT
from test_host_calibrating import FLUX_SCHNELL, lora_for, made, sampled
from test_host_encoders import load

from benchmarks import _gpu_comfy, _host
from benchmarks._gpu_plan import Bench
from demo.build import build_models

cli = importlib.import_module("comfy.cli_args")
patchers = importlib.import_module("comfy.model_patcher")
calibration = importlib.import_module("qsched_pack.qsched_core.calibration")
jaq = importlib.import_module("qsched_pack.qsched_core.objective")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
provenance = importlib.import_module("qsched_pack.nodes.host.weights.provenance")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")
scorers = importlib.import_module("qsched_pack.qsched_core.scorers")
scoring = importlib.import_module("qsched_pack.nodes.host.scoring")
search = importlib.import_module("qsched_pack.qsched_core.search")
studies = importlib.import_module("qsched_pack.qsched_core.study")
sources = importlib.import_module("qsched_pack.nodes.host.source")
text = importlib.import_module("qsched_pack.nodes.host.weights.text")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")

pytestmark = pytest.mark.skipif(DEVICE == "simulated", reason="simulates a GPU itself")
ROOM = 3_000_000  # bytes: less than each of the models here takes
EXACT = 0.0 if DEVICE == "cpu" else 0.005  # relative distance of what is the same
NATIVE = ("fp8_e4m3", "nvfp4", "w4a4", "svdquant_w4a4", "int8_convrot")
EACH = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in NATIVE)]
)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Formats for some GPUs alone are computed by torch on a simulated one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(loading.Request, "check_device", lambda self, device: None)


@pytest.fixture
def dynamic():
    with gpu_host(dynamic=True):
        yield


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return relative(found, wanted) <= EXACT


def opened(file, name):
    return loading.load_diffusion_model(file, Request(name))


@pytest.fixture(scope="module")
def whole(file, sample, lora):
    """``whole(format)``: its picture, and the one with a LoRA, of models that are loaded whole."""
    pictures: dict = {}

    def drawn(name: str):
        if name not in pictures:
            with gpu_host():
                model = opened(file, name) if name else comfy_sd.load_diffusion_model(file)
                pictures[name] = sample(model), sample(with_lora(model, lora))
        return pictures[name]

    return drawn


@pytest.mark.parametrize("room", [None, ROOM])
@EACH
def test_it_samples_what_it_samples_when_loaded_whole(name, room, file, sample, whole):
    wanted = whole(name)[0]
    with gpu_host(dynamic=True, room=room):
        model = opened(file, name)
        assert isinstance(model, patchers.ModelPatcherDynamic)
        assert same(sample(model), wanted)
        assert same(sample(model), wanted)


@pytest.mark.parametrize("room", [None, ROOM])
@EACH
def test_a_lora_is_as_good_as_in_a_model_that_is_loaded_whole(
    name, room, file, sample, whole, lora
):
    """Rounded again by ComfyUI, as it would be, nf4 has .25 and int2 .50 instead of .17 and .38."""
    reference, baked = whole("")[1], whole(name)[1]
    with gpu_host(dynamic=True, room=room):
        model = opened(file, name)
        before = sample(model)
        patched = with_lora(model, lora)
        first, again = sample(patched), sample(patched)
        assert same(sample(model), before), "without the LoRA it is what it was"
        assert same(sample(with_lora(model, lora)), again)
    bound = 1.05 if formats.get(name).bits < 8 else 2.0  # ComfyUI rounds 8 bits again
    assert relative(again, reference) < bound * relative(baked, reference)
    assert relative(first, again) < 0.03


@EACH
def test_a_saved_model_comes_back_bit_for_bit(name, file, sample, lora, tmp_path, dynamic):
    """While it is loaded, partly or not at all, and with a LoRA."""
    model = opened(file, name)
    saving.save_model(model, tmp_path / "before.safetensors")
    wanted = sample(model)
    saving.save_model(model, tmp_path / "after.safetensors")
    for file_name in ("before", "after"):
        again = opened(str(tmp_path / f"{file_name}.safetensors"), name)
        assert same_state(state_bytes(again), state_bytes(model))
        assert same(sample(again), wanted)
    patched = with_lora(model, lora)
    saving.save_model(patched, tmp_path / "merged.safetensors")
    merged = sample(opened(str(tmp_path / "merged.safetensors"), name))
    assert relative(merged, wanted) > 0.3, "the LoRA is in it"
    assert same(sample(model), wanted)


@EACH
def test_a_model_that_is_let_go_leaves_nothing_on_the_gpu(
    name, file, sample, lora, dynamic, caplog
):
    # pytest keeps what is logged; an exception that bitsandbytes logs keeps the frames it passed.
    caplog.set_level(logging.ERROR, "bitsandbytes")
    model = opened(file, name)
    sample(model)
    sample(with_lora(model, lora))
    (copies,) = model.model.dynamic_vbars.values()
    (pins,) = (pins for pins in model.model.dynamic_pins.values() if pins["hostbufs_initialized"])
    pinned = [state[0] for state in pins.values() if isinstance(state, tuple)]
    left = [weakref.ref(one) for one in (model.model, copies, *pinned)]
    del model, copies, pins, pinned
    gc.collect()
    assert [there() for there in left] == [None] * len(left)


def test_a_checkpoint_draws_and_is_saved_with_its_text_encoder_and_vae(tmp_path):
    build_models(tmp_path)
    (path,) = (tmp_path / "checkpoints").glob("*.safetensors")
    again, empty = tmp_path / "again.safetensors", torch.zeros(1, 16, 12, 12)

    def known(model, clip, vae):
        """What a study is known by."""
        source_hash = provenance.model_info(model)["source_hash"]
        return source_hash, provenance.clip_hash(clip), provenance.vae_hash(vae)

    def picture(file):
        model, clip, vae = loading.load_checkpoint(str(file), Request("int2"))
        hashes.add(known(model, clip, vae))
        text = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle above a blue ring"))
        noise = comfy_sample.prepare_noise(empty, 3)
        latent = comfy_sample.sample(
            model, noise, 2, 1.0, "euler", "simple", text, text, empty, seed=3, disable_pbar=True
        )  # fmt: skip
        saving.save_model(model, again, clip, vae)
        pixels = vae.decode(latent).detach()
        hashes.add(known(model, clip, vae))
        return pixels

    hashes: set = set()
    with gpu_host():
        wanted = picture(path)
    with gpu_host(dynamic=True):
        assert same(picture(path), wanted)
        assert same(picture(again), wanted)
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_lora_is_merged_into_a_model_whose_source_is_gone(
    name, file, sample, lora, tmp_path, dynamic
):
    saving.save_model(opened(file, name), tmp_path / "first.safetensors")
    model = opened(str(tmp_path / "first.safetensors"), name)
    model.cached_patcher_init = None
    patched, bare = with_lora(model, lora), sample(model)
    wanted = sample(patched)
    saving.save_model(patched, tmp_path / "merged.safetensors")
    merged = sample(opened(str(tmp_path / "merged.safetensors"), name))
    assert relative(merged, wanted) < 0.6 * relative(bare, wanted)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_hooks_use_a_model_that_is_loaded_whole(name, file, hooked):
    """ComfyUI opens the model again for them, not dynamically."""
    with gpu_host():
        wanted = hooked(opened(file, name))
    with gpu_host(dynamic=True):
        assert same(hooked(opened(file, name)), wanted)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_loaded_model_is_quantized_and_goes_on(name, file, sample, whole, lora):
    (wanted, baked), reference = whole(name), whole("")[1]
    with gpu_host(dynamic=True):
        plain = comfy_sd.load_diffusion_model(file)
        before = sample(plain)
        quantized = loading.quantize_model(plain, Request(name))
        assert isinstance(quantized, patchers.ModelPatcherDynamic)
        assert relative(sample(quantized), wanted) < 0.02
        assert same(sample(plain), before)
        merged = loading.quantize_model(with_lora(plain, lora), Request(name))
        found = sample(merged)
    assert relative(found, reference) < 1.05 * relative(baked, reference)


def test_calibrated_layers_keep_their_codes_under_a_lora(tmp_path, monkeypatch):
    """From the walk through the model on, all of it loaded dynamically."""
    monkeypatch.setattr(sources, "clip_hash", lambda clip: "words")
    path = tmp_path / "flux.safetensors"
    save_file(FLUX_SCHNELL.weights(), path)
    lora = lora_for(comfy_sd.load_diffusion_model(str(path)))
    found = []
    for dynamically in (False, True):
        with gpu_host(dynamic=dynamically):
            plain = comfy_sd.load_diffusion_model(str(path))
            folder = tmp_path / str(dynamically)
            folder.mkdir()
            _, result, model = made(plain, FLUX_SCHNELL, folder)
            assert result.calibrated
            picture = sampled(model)
            found.append((picture, sampled(with_lora(model, lora))))
            reference = sampled(with_lora(plain, lora))
            assert same(sampled(model), picture)
    (whole_picture, whole_patched), (picture, patched) = found
    assert relative(picture, whole_picture) < 0.02
    assert relative(patched, reference) < 1.05 * relative(whole_patched, reference)


def test_a_text_encoder_is_quantized_while_the_original_is_loaded(tmp_path):
    """Its copy has places of its own on the GPU."""
    encoded = []
    for dynamically in (False, True):
        with gpu_host(dynamic=dynamically):
            clip = load("flux", tmp_path)
            before = clip.encode(SHORT)
            # What a newer ComfyUI leaves where a run was interrupted; True is also whether it trains.
            vars(clip.cond_stage_model)["_v_block_faulted"] = True
            clip.cond_stage_model.train()
            quantized = text.quantize_text_encoder(clip, Request("nf4"))
            assert isinstance(quantized.patcher, patchers.ModelPatcherDynamic) == dynamically
            assert "_v_block_faulted" not in vars(quantized.cond_stage_model)
            assert quantized.cond_stage_model.training is True
            encoded.append(quantized.encode(SHORT))
            assert 0.05 < relative(encoded[-1], before) < 0.6
            assert same(clip.encode(SHORT), before)
            assert same(quantized.encode(SHORT), encoded[-1])
    assert relative(*encoded) < 0.01


@pytest.mark.parametrize("row", ["dynamic_step", "dynamic_lora"])
def test_the_gpu_bench_measures_it(row, monkeypatch):
    """In which only a real card's figures mean anything."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_folder()))
    monkeypatch.setattr(cli.args, "cpu", cli.args.cpu)
    if DEVICE == "cpu":
        monkeypatch.setattr(_host, "can_load_dynamically", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with gpu_host(dynamic=True), _host.loading_dynamically(False):
        found = getattr(_gpu_comfy, row)(Bench(management.get_torch_device(), tiny=True))
    assert found.ours > 0 and found.other > 0 and found.unit == "s/step"


def test_a_search_finds_the_same_and_is_known_by_the_same(tmp_path):
    """With text encoder, model, VAE and scorer, each moved as ComfyUI does."""
    build_models(tmp_path)
    (checkpoint,), (scorer,) = (
        sorted((tmp_path / name).glob("*.safetensors")) for name in ("checkpoints", "clip_score")
    )
    prompts = prompt_sets.CalibrationPrompts.of(
        ["a red circle", "two blue squares"], ["a green ring", "a red square"]
    )
    found = []
    for dynamically in (False, True):
        with gpu_host(dynamic=dynamically):
            model, clip, vae = loading.load_checkpoint(str(checkpoint), Request("int2"))
            place = scoring.ManagedPlacement()
            objective = jaq.Objective(
                scorers.load_file(scorer, "", place, False), "clip_iqa", 2.0, place, "", {}, False
            )
            trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)
            source = sources.ComfySource(model, clip, vae, trajectory, width=96, height=96)
            settings = search.CalibrationSettings("gp", 4, seed=1)
            study = studies.StudyPlace(tmp_path / str(dynamically))
            result = calibration.calibrate(source, objective, prompts, settings, study)
            found.append((source.describe(), [trial.value for trial in result.trials]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5 if EXACT == 0 else 0.05)
