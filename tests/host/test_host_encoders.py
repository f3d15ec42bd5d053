"""T5 and its companions: ComfyUI's own loaders on small files of the published keys, quantized by ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from families import FLUX_SCHNELL
from inside import Request, comfy_sd, relative, save_file
from small_encoders import CONFIGS, FILES, KINDS, LAYERS, LONG, SHORT
from test_host_lengths import Latents, comfy_sample, made, prompt_sets

text = importlib.import_module("qsched_pack.nodes.host.weights.text")
# Relative distance of the encoding, random weights; nf4: a third above the .334 that was measured.
DISTANCE = {"int8": 0.03, "nf4": 0.45}
# linear layers of each tower, and those that stay (projections are heads)
LINEAR = {"t5": 7 * LAYERS, "l": 6 * LAYERS, "g": 6 * LAYERS}


def load(kind: str, folder: Path):
    """A CLIP as ComfyUI's Dual- and TripleCLIPLoader load it; ``folder`` keeps its files."""
    clip_type, towers = KINDS[kind]
    paths = [folder / f"{name}.safetensors" for name in towers]
    for name, path in zip(towers, paths, strict=True):
        if not path.exists():
            save_file(FILES[name](), path)
    return comfy_sd.load_clip(
        [str(path) for path in paths],
        clip_type=getattr(comfy_sd.CLIPType, clip_type),
        model_options=dict(CONFIGS),
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Callable:
    """``encoder(kind)``: a CLIP, which is loaded once."""
    return cache(partial(load, folder=tmp_path_factory.mktemp("encoders")))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("name", DISTANCE)
def test_every_tower_is_quantized_and_encodes_close_to_the_original(kind, name, encoder):
    original = encoder(kind)
    quantized = text.quantize_text_encoder(original, Request(name))
    info = quantized.patcher.model_options["qsched"]
    assert info["quantized_layers"] == {name: sum(LINEAR[tower] for tower in KINDS[kind][1])}
    for prompt in (SHORT, LONG):
        (wanted, pooled), (found, other) = (
            c.encode_from_tokens(c.tokenize(prompt), return_pooled=True)
            for c in (original, quantized)
        )
        assert found.shape == wanted.shape and torch.isfinite(found).all()
        assert 0 < relative(found, wanted) < DISTANCE[name]
        if pooled is not None and pooled.abs().max() > 0:
            assert 0 < relative(other, pooled) < DISTANCE[name]


def test_t5_gives_as_many_tokens_as_the_prompt_has(encoder):
    found = encoder("flux")
    short, long = (
        found.encode_from_tokens_scheduled(found.tokenize(p))[0][0] for p in (SHORT, LONG)
    )
    assert short.shape == (1, 256, 4096) and long.shape[1] > 256


@pytest.mark.full
@pytest.mark.parametrize("name", ["", "nf4"])
def test_a_search_with_clip_and_t5_sees_ksamplers_pictures(name, encoder, files):
    """FLUX with its own two encoders, and prompts on both sides of 256 tokens."""
    found = encoder("flux")
    found = text.quantize_text_encoder(found, Request(name)) if name else found
    model, prompts = files(FLUX_SCHNELL), prompt_sets.PromptSet((SHORT, LONG, "a cat"), (1, 2, 3))
    pictures, source = made(model, FLUX_SCHNELL, found, prompts)
    assert source.alike(prompts) == [[0, 2], [1]]
    empty = torch.zeros_like(source.latent)

    def encode(prompt: str) -> list:
        return found.encode_from_tokens_scheduled(found.tokenize(prompt))

    for row, (prompt, seed) in enumerate(zip(prompts.prompts, prompts.seeds, strict=True)):
        noise = comfy_sample.prepare_noise(empty, seed)
        latents = comfy_sample.sample(
            model, noise, 2, 2.0, "euler", "simple", encode(prompt), encode(""), empty,
            seed=seed, disable_pbar=True,
        )  # fmt: skip
        wanted = Latents(8).decode(latents)[0].float().clamp(0, 1)
        assert (pictures[row] - wanted).abs().max() <= 2 / 255, prompt[:20]
