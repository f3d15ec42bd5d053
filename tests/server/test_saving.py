"""Quantize, patch, save and report through the real server, and open the files without the pack."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from devtools.server import ComfyServer, ServerError

CAPTION = "a red circle to the left of a green square on a white background"


@pytest.fixture(scope="module")
def lora(server_base, demo_checkpoint):
    """A LoRA for the demo's generator, by ComfyUI's own name."""
    torch.manual_seed(0)
    prefix, parts = "model.diffusion_model.", {}
    for key, value in load_file(demo_checkpoint).items():
        if key.startswith(f"{prefix}joint_blocks") and key.endswith("mlp.fc1.weight"):
            name = f"diffusion_model.{key.removeprefix(prefix).removesuffix('.weight')}"
            parts[f"{name}.lora_A.weight"] = torch.randn(4, value.shape[1]) * 0.2
            parts[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 4) * 0.2
    path = server_base / "models" / "loras" / "test_lora.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(parts, path)
    return path.name


@pytest.fixture(scope="module")
def plain_server(comfyui_path, server_args, tmp_path_factory):
    """A ComfyUI without the pack."""
    base = tmp_path_factory.mktemp("plain")
    running = ComfyServer(comfyui_path, base, extra_args=server_args, with_pack=False)
    with running:
        assert not any(name.startswith("QSched") for name in running.object_info())
        yield running


def quantizing(prompt: dict, weight_format: str) -> dict:
    """The demo prompt with our loader in place of the checkpoint loader."""
    prompt["1"]["class_type"] = "QSchedLoadCheckpoint"
    prompt["1"]["inputs"]["weight_format"] = weight_format
    return prompt


def add_save(prompt: dict, prefix: str, model=("1", 0), checkpoint: bool = True) -> None:
    parts = {"clip": ["1", 1], "vae": ["1", 2]} if checkpoint else {}
    inputs = {"model": list(model), "filename_prefix": prefix, **parts}
    prompt["9"] = {"class_type": "QSchedSaveModel", "inputs": inputs}


def pixels(server: ComfyServer, entry: dict, node: str = "7") -> np.ndarray:
    found = [server.image(item) for item in entry["outputs"][node]["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(data)), dtype=float) for data in found])


def place(path, server: ComfyServer, folder: str) -> str:
    target = server.base / "models" / folder / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
    return path.name


@pytest.mark.full
@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_a_saved_checkpoint(weight_format, server, plain_server, demo_prompt):
    """A native one draws the same in a ComfyUI without the pack; an extended one fails there."""
    prompt = quantizing(demo_prompt(CAPTION, seed=5), weight_format)
    add_save(prompt, f"checkpoints/saved_{weight_format}")
    done = server.run(prompt)
    wanted = pixels(server, done)
    text = done["outputs"]["9"]["text"][0]
    path = server.output / "checkpoints" / f"saved_{weight_format}_00001_.safetensors"
    assert str(path) in text and ("plain ComfyUI" in text) == (weight_format == "int8")

    again = quantizing(demo_prompt(CAPTION, seed=5), weight_format)
    again["1"]["inputs"]["ckpt_name"] = place(path, server, "checkpoints")
    assert np.array_equal(pixels(server, server.run(again)), wanted)

    elsewhere = demo_prompt(CAPTION, seed=5)
    elsewhere["1"]["inputs"]["ckpt_name"] = place(path, plain_server, "checkpoints")
    if weight_format == "int8":
        drawn = pixels(plain_server, plain_server.run(elsewhere))
        assert np.abs(drawn - wanted).mean() < 4
    else:
        with pytest.raises(ServerError, match=r"CheckpointLoaderSimple.*qsched_nf4"):
            plain_server.run(elsewhere)


@pytest.mark.full
def test_a_saved_diffusion_model_opens_in_the_plain_loader(server, plain_server, demo_prompt):
    prompt = quantizing(demo_prompt(CAPTION, seed=5), "int8")
    add_save(prompt, "diffusion_models/alone", checkpoint=False)
    server.run(prompt)
    path = server.output / "diffusion_models" / "alone_00001_.safetensors"
    name = place(path, plain_server, "diffusion_models")
    loader = {"unet_name": name, "weight_dtype": "default"}
    context = {"class_type": "UNETLoader", "inputs": loader}
    probe = {
        "1": context,
        "2": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "again"}},
    }
    plain_server.run(probe)
    ours, theirs = load_file(path), load_file(plain_server.output / "again_00001_.safetensors")
    for key, value in theirs.items():
        if key.endswith(".weight") and value.dtype == torch.int8:
            assert torch.equal(value, ours[key]), key


def test_loras_reach_the_quantized_model_and_its_file(server, demo_prompt, lora):
    def draw(weight_format: str | None, strength: float, save: str = "") -> np.ndarray:
        prompt = demo_prompt(CAPTION, seed=5)
        if weight_format:
            prompt = quantizing(prompt, weight_format)
        inputs = {"model": ["1", 0], "lora_name": lora, "strength_model": strength}
        prompt["8"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        prompt["5"]["inputs"]["model"] = ["8", 0]
        if save:
            add_save(prompt, save, model=("8", 0))
        return pixels(server, server.run(prompt))

    def distance(a, b):
        return np.abs(a - b).mean()

    plain, wanted = draw(None, 0.0), draw(None, 1.0)
    bare = draw("nf4", 0.0)
    patched = draw("nf4", 1.0, save="checkpoints/merged")
    effect = distance(plain, wanted)
    assert effect > 2
    assert distance(patched, wanted) < effect and distance(patched, wanted) < distance(bare, wanted)
    assert np.array_equal(draw("nf4", 0.0), bare), "unpatching is exact"
    prompt = quantizing(demo_prompt(CAPTION, seed=5), "nf4")
    path = server.output / "checkpoints" / "merged_00001_.safetensors"
    prompt["1"]["inputs"]["ckpt_name"] = place(path, server, "checkpoints")
    assert distance(pixels(server, server.run(prompt)), wanted) < effect


def test_the_report_and_the_text_encoder(server, demo_prompt):
    prompt = quantizing(demo_prompt(CAPTION, seed=5), "nf4")
    bare = pixels(server, server.run(prompt))
    encoder = {"clip": ["1", 1], "weight_format": "int8", "layers": ""}
    prompt["8"] = {"class_type": "QSchedQuantizationReport", "inputs": {"model": ["1", 0]}}
    done = server.run(prompt)
    shown = done["outputs"]["8"]
    assert "joint_blocks.0.x_block.attn.qkv" in shown["text"][0] and "4.12" in shown["text"][0]
    assert pixels(server, done, "8").shape[2] == 1200
    prompt["11"] = {"class_type": "QSchedQuantizeTextEncoder", "inputs": encoder}
    prompt["2"]["inputs"] = {"clip": ["11", 0], "text": CAPTION}
    assert pixels(server, server.run(prompt)).shape == bare.shape


def test_what_can_not_work_is_refused_with_the_node_and_the_input(server, demo_prompt):
    prompt = demo_prompt(CAPTION)
    add_save(prompt, "checkpoints/plain")
    with pytest.raises(ServerError, match=r"QSchedSaveModel.*model is not quantized"):
        server.run(prompt)
    prompt = quantizing(demo_prompt(CAPTION), "nf4")
    add_save(prompt, "../outside")
    with pytest.raises(ServerError, match=r"QSchedSaveModel.*filename_prefix='../outside'"):
        server.run(prompt)
    prompt = quantizing(demo_prompt(CAPTION), "nf4")
    prompt["1"]["inputs"]["layers"] = "@conv2d=int8"
    with pytest.raises(ServerError, match="int8 can't store @conv2d"):
        server.run(prompt)
