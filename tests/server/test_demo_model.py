"""The demo's model inside ComfyUI is the model that was trained: same numbers, and it draws."""

from __future__ import annotations

import importlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.build import build_checkpoint
from demo.mmdit import TEXT_TOKENS, MMDiT
from demo.taesd import SD3_SCALE, SD3_SHIFT, TAESD
from demo.text import context_of, tokenize

CAPTION = "a red circle to the left of a green square on a white background"


@pytest.fixture(scope="module")
def loaded(comfy_in_process, demo_checkpoint):
    """What CheckpointLoaderSimple gives, and the plain-torch twins of its models."""
    sd = importlib.import_module("comfy.sd")
    model, clip, vae, _ = sd.load_checkpoint_guess_config(str(demo_checkpoint))
    state = load_file(demo_checkpoint)
    return SimpleNamespace(
        model=model,
        clip=clip,
        vae=vae,
        mmdit=_twin(MMDiT(), state, "model.diffusion_model."),
        taesd=_twin(TAESD(), state, "first_stage_model."),
    )


def _twin(module: torch.nn.Module, state: dict, prefix: str) -> torch.nn.Module:
    names = module.state_dict().keys()
    part = {name: state[prefix + name].float() for name in names}
    if "context_embedder.weight" in part:
        part["context_embedder.weight"] = part["context_embedder.weight"][:, :768]
    module.load_state_dict(part)
    return module.eval()


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_text_encoder_gives_the_tables(loaded):
    context = loaded.clip.encode_from_tokens(loaded.clip.tokenize(CAPTION))
    assert context.shape == (1, 77, 4096)
    ours = context_of(tokenize([CAPTION]))
    assert _relative(ours, context[:, :TEXT_TOKENS, :768].float()) < 1e-4
    pads = context[:, TEXT_TOKENS - 1 :, :768]
    assert torch.equal(pads, pads[:, :1].expand_as(pads))
    assert context[..., 768:].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 12), (8, 16)], ids=["square", "wide"])
def test_twin_equals_comfyuis_mmdit(loaded, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, *size, generator=generator)
    sigma = torch.tensor([0.9, 0.35])
    captions = [CAPTION, "a blue star"]
    context = torch.cat(
        [loaded.clip.encode_from_tokens(loaded.clip.tokenize(c)).float() for c in captions]
    )
    theirs = loaded.model.model.diffusion_model(x, sigma * 1000, context=context)
    ours = loaded.mmdit(x, sigma, context_of(tokenize(captions)))
    assert theirs.dtype == torch.float32
    assert _relative(ours, theirs) < 1e-4


@torch.no_grad()
def test_twin_equals_comfyuis_autoencoder(loaded):
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    latent = loaded.vae.encode(images.movedim(1, -1))
    process_in = loaded.model.model.latent_format.process_in
    assert _relative(loaded.taesd.encode(images), process_in(latent).float()) < 1e-3
    decoded = loaded.vae.decode(latent).movedim(-1, 1)
    ours = loaded.taesd.decode((latent - SD3_SHIFT) * SD3_SCALE).clamp(0, 1)
    assert _relative(ours, decoded.float()) < 1e-3


def test_core_nodes_draw_what_was_asked(server, demo_prompt):
    entry = server.run(demo_prompt(CAPTION, seed=1, steps=4, batch=2))
    images = entry["outputs"]["7"]["images"]
    assert len(images) == 2
    for image in images:
        picture = Image.open(io.BytesIO(server.image(image))).convert("RGB")
        assert picture.size == (96, 96)
        red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.float32) / 255, -1, 0)
        is_red, is_green = (red - green > 0.3), (green - red > 0.2)
        white = np.minimum(np.minimum(red, green), blue) > 0.8
        assert is_red.mean() > 0.02
        assert is_green.mean() > 0.02
        assert white.mean() > 0.4
        columns = np.arange(96)
        assert (is_red.sum(0) @ columns) / is_red.sum() < (
            is_green.sum(0) @ columns
        ) / is_green.sum()


def test_build_is_skipped_when_current_and_repaired_when_not(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert build_checkpoint(path)
    whole = path.stat().st_size
    assert not build_checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(whole - 1)
    assert build_checkpoint(path)
    assert path.stat().st_size == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mmdit\.safetensors in .*demo/weights"):
        build_checkpoint(tmp_path / "out.safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []
