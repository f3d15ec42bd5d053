"""Saving, merging and reporting quantized models inside the real ComfyUI."""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import importlib.util
import json
import os
import re
import threading
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
from inside import (
    ALL,
    DISTANCE,
    NAMES,
    REPO,
    Request,
    comfy_sd,
    formats,
    loading,
    management,
    relative,
    same_state,
    save_file,
    state_bytes,
    taesd,
    weights,
    with_lora,
)

info = importlib.import_module("qsched_pack.nodes.host.weights.provenance")
layouts = importlib.import_module("qsched_pack.nodes.host.weights.layouts")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")
report = importlib.import_module("qsched_pack.qsched_core.formats.report")
workspace = importlib.import_module("qsched_pack.qsched_core.workspace")
comfy_utils = importlib.import_module("comfy.utils")
folder_paths = importlib.import_module("folder_paths")
chart = importlib.import_module("qsched_pack.qsched_core.formats.chart")

OPENERS = {
    "load_diffusion_model": r"Load Diffusion Model \(Quantized\)",
    "load_checkpoint_guess_config": r".*Load Checkpoint \(Quantized\)",
}


def metadata(path) -> dict:
    with safetensors.safe_open(path, framework="pt") as opened:
        return opened.metadata()


@ALL
def test_a_saved_model_comes_back_bit_for_bit(name, loaded, sample, tmp_path):
    model = loaded(name)
    path = tmp_path / "sub" / "saved.safetensors"
    place, found = saving.save_model(model, path)
    assert place == path
    assert [p.name for p in path.parent.iterdir()] == ["saved.safetensors"], "nothing else is left"
    assert found["kind"] == formats.get(name).file_kind
    again = loading.load_diffusion_model(str(path), Request(name))
    assert same_state(state_bytes(again), state_bytes(model))
    assert torch.equal(sample(again), sample(model))
    stored = json.loads(metadata(path)["qsched"])
    assert stored["source"] == "tiny.safetensors" and stored["format"] == name
    assert stored["source_hash"] == info.model_info(model)["source_hash"] and stored["version"] == 1
    assert info.model_info(again)["source"] == "tiny.safetensors"
    assert path.stat().st_size < model.model_size() + 100_000


@pytest.mark.parametrize("name", [n for n in NAMES if formats.get(n).file_kind == "native"])
def test_native_files_open_in_plain_comfyui(name, loaded, sample, tmp_path):
    model = loaded(name)
    saving.save_model(model, tmp_path / "saved.safetensors")
    core = comfy_sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    # There modulation layers have their activations rounded too, and a CPU computes in fp32.
    assert relative(sample(core), sample(model)) < 1.5 * DISTANCE[name]
    assert info.model_info(core)["format"].startswith("Tensor")


@pytest.mark.parametrize("name", [n for n in NAMES if formats.get(n).file_kind == "extended"])
@pytest.mark.parametrize("loader", ["load_diffusion_model", "load_checkpoint_guess_config"])
def test_extended_files_say_in_plain_comfyui_what_opens_them(name, loader, loaded, tmp_path):
    model = loaded(name)
    saving.save_model(model, tmp_path / "saved.safetensors")
    says = rf"qsched_{name}: open this file with {OPENERS[loader]}"
    with pytest.raises(KeyError, match=says):
        getattr(comfy_sd, loader)(str(tmp_path / "saved.safetensors"))


def node_names() -> set[str]:
    text = (REPO / "nodes" / "loading.py").read_text(encoding="utf-8")
    return set(re.findall(r'display_name="(Load [^"]*)"', text))


def test_what_a_file_says_of_its_nodes_are_their_names():
    assert node_names() and all(name in layouts.HINT for name in node_names())


def test_files_without_that_hint_open_as_before(tmp_path, loaded, sample):
    """Those of earlier versions."""
    model = loaded("nf4")
    path, _ = saving.save_model(model, tmp_path / "saved.safetensors")
    state, facts = safetensors.torch.load_file(path), metadata(path)
    for key in [k for k in state if k.endswith("comfy_quant")]:
        entry = json.loads(state[key].numpy().tobytes())
        assert entry["format"] != "qsched_nf4"
        entry["format"] = "qsched_nf4"
        state[key] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    safetensors.torch.save_file(state, tmp_path / "older.safetensors", facts)
    older = loading.load_diffusion_model(str(tmp_path / "older.safetensors"), Request("nf4"))
    assert same_state(state_bytes(older), state_bytes(model))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_loras_are_merged_in_full_precision_or_left_out(name, file, plain, sample, lora, tmp_path):
    model = loading.load_diffusion_model(file, Request(name))
    patched, wanted = with_lora(model, lora), sample(with_lora(plain, lora))
    saving.save_model(patched, tmp_path / "merged.safetensors")
    merged = loading.load_diffusion_model(str(tmp_path / "merged.safetensors"), Request(name))
    assert relative(sample(merged), wanted) < 2 * DISTANCE[name]
    kept = info.model_info(merged)
    assert kept["merged_patches"] == info.model_info(patched)["patches"] != ""
    saving.save_model(patched, tmp_path / "bare.safetensors", merge_loras=False)
    bare = loading.load_diffusion_model(str(tmp_path / "bare.safetensors"), Request(name))
    assert same_state(state_bytes(bare), state_bytes(model))
    assert patched.patches, "the model itself keeps its LoRA"


def test_loras_are_merged_even_when_the_source_is_gone(file, plain, sample, lora, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(file).read_bytes())
    patched = with_lora(loading.load_diffusion_model(str(copy), Request("nf4")), lora)
    copy.unlink()
    saving.save_model(patched, tmp_path / "merged.safetensors")
    merged = loading.load_diffusion_model(str(tmp_path / "merged.safetensors"), Request("nf4"))
    wanted = sample(with_lora(plain, lora))
    assert relative(sample(merged), wanted) < 0.5 * relative(sample(plain), wanted)


def test_a_checkpoint_is_saved_with_its_vae(sample, tmp_path):
    torch.manual_seed(0)
    state = {f"model.diffusion_model.{k}": v for k, v in weights().items()}
    state |= {f"first_stage_model.{k}": v for k, v in taesd.TAESD().state_dict().items()}
    save_file(state, tmp_path / "checkpoint.safetensors")
    model, _, vae = loading.load_checkpoint(
        str(tmp_path / "checkpoint.safetensors"), Request("int8")
    )
    saving.save_model(model, tmp_path / "saved.safetensors", vae=vae)
    again, _, other = loading.load_checkpoint(str(tmp_path / "saved.safetensors"), Request("int8"))
    assert torch.equal(sample(again), sample(model))
    picture = torch.rand(1, 32, 32, 3)
    assert torch.equal(other.decode(other.encode(picture)), vae.decode(vae.encode(picture)))
    core, _, _, _ = comfy_sd.load_checkpoint_guess_config(
        str(tmp_path / "saved.safetensors"), output_clip=False
    )
    assert relative(sample(core), sample(model)) < 0.03


NOTHING = torch.tensor([])
PREDICTIONS = {
    "epsilon": {},
    "v": {"v_pred": NOTHING},
    "v, zero terminal SNR": {"v_pred": NOTHING, "ztsnr": NOTHING},
    "v, EDM levels": {
        "edm_vpred.sigma_max": torch.tensor(99.0),
        "edm_vpred.sigma_min": torch.tensor(0.01),
    },
    "Playground 2.5": {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
}


@pytest.fixture(scope="module")
def sdxl() -> dict[str, torch.Tensor]:
    return families.SDXL.weights()


def prediction(model):
    """How the model predicts: its parametrisation, its levels, and its latents."""
    sampling = model.get_model_object("model_sampling")
    kinds = {c.__name__ for c in type(sampling).__mro__ if c.__module__ == "comfy.model_sampling"}
    form = type(model.get_model_object("latent_format")).__name__
    return kinds, getattr(sampling, "zsnr", None), sampling.sigmas.tolist(), form


def check_prediction(model, wanted, folder):
    """Saved alone, it predicts as before in ComfyUI's loader and in both of ours."""
    path = str(folder / "saved.safetensors")
    saving.save_model(model, path)
    for load in (loading.load_diffusion_model, loading.load_checkpoint_model):
        assert prediction(load(path, Request("int8"))) == wanted
    assert prediction(comfy_sd.load_diffusion_model(path)) == wanted


@pytest.mark.parametrize("keys", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_saved_sdxl_predicts_as_before(keys, sdxl, tmp_path):
    bare = str(tmp_path / "sdxl.safetensors")
    save_file(sdxl | keys, bare)
    model = loading.load_diffusion_model(bare, Request("int8"))
    wanted = prediction(comfy_sd.load_diffusion_model(bare))
    assert prediction(model) == wanted
    check_prediction(model, wanted, tmp_path)
    checkpoint = str(tmp_path / "checkpoint.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in sdxl.items()} | keys, checkpoint)
    assert prediction(loading.load_diffusion_model(checkpoint, Request("int8"))) == wanted


def test_a_prediction_that_a_node_set_is_saved(sdxl, tmp_path):
    advanced = importlib.import_module("comfy_extras.nodes_model_advanced")
    bare = str(tmp_path / "sdxl.safetensors")
    save_file(sdxl, bare)
    model = loading.load_diffusion_model(bare, Request("int8"))
    (patched,) = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)
    wanted = prediction(patched)
    assert wanted != prediction(model)
    path = str(tmp_path / "saved.safetensors")
    saving.save_model(patched, path)
    kinds, *rest = prediction(loading.load_diffusion_model(path, Request("int8")))
    assert "V_PREDICTION" in kinds and rest == list(wanted[1:])


def test_what_can_not_be_saved_is_refused_and_leaves_nothing(
    loaded, plain, lora, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="not quantized by this pack"):
        saving.save_model(plain, tmp_path / "saved.safetensors")
    model = with_lora(loaded("nf4"), lora)
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    monkeypatch.setattr(saving, "merge_patches", lambda model: 1 / 0)  # asked before that work
    with pytest.raises(OSError, match=r"saved\.safetensors can't be written.* 0\.0 MB free"):
        saving.save_model(model, tmp_path / "saved.safetensors")
    monkeypatch.undo()
    model = loaded("nf4")
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saving.save_model(model, tmp_path / "saved.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the library's error numbers are others there")
def test_a_disk_that_fills_up_while_saving_is_named_and_nothing_is_left(
    loaded, tmp_path, monkeypatch
):
    def full(state, path, metadata=None):
        Path(path).with_name(".tmpAbc123").write_bytes(b"half")  # as the library leaves it
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        OSError, match=r"saved\.safetensors .*disk is full: it takes .*free"
    ) as told:
        saving.save_model(loaded("nf4"), tmp_path / "saved.safetensors")
    assert told.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_two_servers_that_save_at_once_keep_both_models(loaded, tmp_path, monkeypatch):
    """The other one takes the next free name while this one writes."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, save = loaded("nf4"), comfy_utils.save_torch_file

    def meanwhile(*args, **kwargs):
        monkeypatch.undo()
        monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
        places.append(saving.save_model(loaded("int8"), saving.next_paths("sub/model"))[0])
        return save(*args, **kwargs)

    places = []
    monkeypatch.setattr(comfy_utils, "save_torch_file", meanwhile)
    places.append(saving.save_model(model, saving.next_paths("sub/model"))[0])
    assert [p.name for p in places] == ["model_00001_.safetensors", "model_00002_.safetensors"]
    kept = [json.loads(metadata(p)["qsched"])["format"] for p in places]
    assert kept == ["int8", "nf4"]
    assert sorted(p for p in places[0].parent.iterdir()) == places


def test_a_model_that_is_being_saved_is_not_taken_for_abandoned(loaded, tmp_path, monkeypatch):
    save = comfy_utils.save_torch_file

    def cleaned(*args, **kwargs):
        save(*args, **kwargs)
        assert workspace.remove_abandoned(tmp_path, deep=True) == 0

    monkeypatch.setattr(comfy_utils, "save_torch_file", cleaned)
    saving.save_model(loaded("nf4"), tmp_path / "saved.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["saved.safetensors"]


def started() -> None:
    """The pack, as ComfyUI starts it."""
    place = importlib.util.spec_from_file_location("qsched_pack.nodes", REPO / "nodes/__init__.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    asyncio.run(module.QSchedExtension().on_load())
    for thread in threading.enumerate():
        if thread.name == "qsched-clean":
            thread.join()


def test_what_a_killed_run_left_goes_when_the_server_starts(tmp_path, monkeypatch):
    for name in ("get_output_directory", "get_user_directory"):
        monkeypatch.setattr(folder_paths, name, lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path / "none")])
    monkeypatch.setattr(folder_paths, "add_model_folder_path", lambda *names: None)
    left = tmp_path / "a" / "b"
    left.mkdir(parents=True)
    half = workspace.Workspace(left, "model.safetensors").__enter__()
    half.data.write_bytes(b"half")
    started()
    assert half.data.exists(), "its writer lives"
    half._lock.release()
    started()
    assert not list(left.iterdir())


def quantized_tensors() -> int:
    """How many are alive in this process."""
    gc.collect()
    return sum(isinstance(o, loading.QuantizedTensor) for o in gc.get_objects())


def test_an_interrupted_loading_leaves_nothing(file):
    before = quantized_tensors()
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        loading.load_diffusion_model(file, Request("nf4"))
    assert quantized_tensors() == before
    loading.load_diffusion_model(file, Request("nf4"))


def test_running_out_of_memory_leaves_nothing(file, monkeypatch):
    form, before, calls = type(formats.get("nf4")), quantized_tensors(), []
    quantize = form.quantize

    def scarce(self, weight, *args, **kwargs):
        calls.append(weight.shape)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return quantize(self, weight, *args, **kwargs)

    monkeypatch.setattr(form, "quantize", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_diffusion_model(file, Request("nf4"))
    monkeypatch.undo()
    assert len(calls) > 5 and quantized_tensors() == before
    loading.load_diffusion_model(file, Request("nf4"))


@ALL
def test_the_report_counts_every_weight(name, loaded):
    model = loaded(name)
    rows = info.layer_rows(model.model.diffusion_model)
    matrices = {k.removesuffix(".weight"): v for k, v in weights().items() if v.ndim >= 2}
    matrices = {k: v for k, v in matrices.items() if k != "pos_embed"}
    assert {r.name: r.weights for r in rows} == {k: v.numel() for k, v in matrices.items()}
    measured = {r.name: r.error for r in rows if r.error is not None}
    assert len(measured) == sum(loading.model_info(model)["quantized_layers"].values())
    layers = dict(model.model.diffusion_model.named_modules())
    for row in rows[4:7]:
        wanted = matrices[row.name].float()
        found = layers[row.name].weight.data.dequantize().float()
        assert row.error == pytest.approx(relative(found, wanted), rel=0.02)
    text = report.table(rows)
    assert all(r.name in text for r in rows)
    assert sum(r.nbytes for r in report.summary(rows)) == sum(r.nbytes for r in rows)
    picture = chart.draw(rows, info.report_title(model))
    assert picture.width == 1200
    fewer = chart.draw(rows[:-1], info.report_title(model))
    assert fewer.size != picture.size or fewer.tobytes() != picture.tobytes()


def test_the_report_takes_models_that_others_quantized(plain, loaded, tmp_path):
    model = loaded("int8")
    saving.save_model(model, tmp_path / "saved.safetensors")
    core = comfy_sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    kinds = {r.format for r in info.layer_rows(core.model.diffusion_model)}
    assert "TensorWiseINT8Layout" in kinds
    found = {r.format for r in info.layer_rows(plain.model.diffusion_model)}
    assert found == {str(plain.model.get_dtype()).removeprefix("torch.")} <= {"float32", "float16"}
    chart.draw([], "empty")


JUNK_ENTRIES = {
    "no JSON": b"\xffjunk",
    "a list": b"[1]",
    "params that are a text": b'{"format": "qsched_int2", "params": "x"}',
    "a shape that does not fit": b'{"format": "qsched_int2", "shape": [8, 1000000000]}',
    "an unknown format": b'{"format": "banana"}',
}


@pytest.mark.parametrize("case", JUNK_ENTRIES)
def test_a_junk_entry_names_its_file_and_layer(case, loaded, tmp_path):
    saving.save_model(loaded("int2"), tmp_path / "good.sft")
    with safetensors.safe_open(tmp_path / "good.sft", framework="pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    key = next(key for key in state if key.endswith(".comfy_quant"))
    state[key] = torch.frombuffer(bytearray(JUNK_ENTRIES[case]), dtype=torch.uint8)
    path = tmp_path / "junk.safetensors"
    save_file(state, path)
    layer = re.escape(key.removesuffix(".comfy_quant"))
    with pytest.raises(formats.FormatError, match=rf"junk\.safetensors.*{layer}"):
        loading.load_diffusion_model(str(path), Request("int2"))


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_a_table_that_is_cut_short_is_refused_before_a_kernel_reads_on(name, loaded, tmp_path):
    saving.save_model(loaded(name), tmp_path / "good.sft")
    with safetensors.safe_open(tmp_path / "good.sft", framework="pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    entry = next(key for key in state if key.endswith(".comfy_quant"))
    layer = entry.removesuffix(".comfy_quant")
    table = next(k for k in state if k.startswith(f"{layer}.weight") and k.endswith("scale"))
    state[table] = state[table][:1].clone()
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(
        formats.FormatError, match=rf"short\.safetensors.*{re.escape(layer)}.*scale"
    ):
        loading.load_diffusion_model(str(tmp_path / "short.safetensors"), Request(name))
