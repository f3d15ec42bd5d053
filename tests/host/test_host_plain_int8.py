"""How far an int8 file's pictures in plain ComfyUI (0.30.0) are from ours, and what that comes from.

README says the figures.  Activations are rounded to int8, so any change of a model's input, however
small, moves some of them by a step: the bounds are against what that alone does to ComfyUI's own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from inside import DEVICE, REPO, Request, comfy_sample, comfy_sd, loading

build = importlib.import_module("qsched_pack.demo.build")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")
CAPTIONS = (
    "a red circle to the left of a green square on a white background",
    "a large green circle on a gray background",
    "two red squares on a white background",
)


@dataclass(frozen=True)
class Opened:
    """One int8 checkpoint, as the pack and as ComfyUI has it; both draw with the same VAE."""

    ours: Any
    core: Any
    clip: Any
    vae: Any

    def levels(self, model, change: float = 0.0) -> torch.Tensor:
        """Pictures in 256 levels, the noise taken ``change`` larger."""
        found = []
        for seed, caption in enumerate(CAPTIONS):
            text, nothing = (
                self.clip.encode_from_tokens_scheduled(self.clip.tokenize(t)) for t in (caption, "")
            )
            empty = torch.zeros(1, 16, 12, 12)
            noise = comfy_sample.prepare_noise(empty, seed) * (1 + change)
            latent = comfy_sample.sample(
                model, noise, 4, 1.0, "euler", "simple", text, nothing, empty,
                seed=seed, disable_pbar=True,
            )  # fmt: skip
            found.append(self.vae.decode(latent).clamp(0, 1).mul(255).round())
        return torch.cat(found)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opened:
    folder = tmp_path_factory.mktemp("demo")
    build.build_checkpoint(folder / "demo.safetensors", REPO / "demo" / "weights")
    ours, clip, vae = loading.load_checkpoint(str(folder / "demo.safetensors"), Request("int8"))
    path, _ = saving.save_model(ours, folder / "int8.safetensors", clip, vae)
    core, *_ = comfy_sd.load_checkpoint_guess_config(str(path))
    return Opened(ours, core, clip, vae)


def test_pictures_are_within_what_a_millionth_of_noise_changes(opened):
    core = opened.levels(opened.core)
    own = (opened.levels(opened.core, 1e-6) - core).abs()
    apart = (opened.levels(opened.ours) - core).abs()
    assert apart.mean() < 0.5 and (apart > 8).float().mean() < 0.01 and apart.max() < 64
    assert apart.mean() < 6 * own.mean()


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of another device round in their own ways")
def test_each_layer_is_equal_but_for_modulation(opened):
    """ComfyUI does not heed "full_precision_matrix_mult" of int8 layers; else nothing is left."""
    theirs = dict(opened.core.model.diffusion_model.named_modules())
    random = torch.Generator().manual_seed(0)
    distances: dict[bool, list[float]] = {True: [], False: []}
    for name, layer in opened.ours.model.diffusion_model.named_modules():
        if getattr(layer, "stored", None) is None:
            continue
        x = 3 * torch.randn(20, layer.in_features, generator=random)
        wanted = theirs[name](x)
        distance = ((layer(x) - wanted).abs().max() / wanted.abs().max()).item()
        distances[layer.weight_only].append(distance)
        assert layer.weight_only == theirs[name]._full_precision_mm_config, name
    assert max(distances[False]) < 1e-6
    assert 1e-4 < max(distances[True]) < 0.02
