"""T5 and its companions: ComfyUI's own loaders on small files of the published keys, quantized by ours.

Widths that ComfyUI takes for granted (T5-XXL's 4096, CLIP's 768 and 1280) are the published ones; the
files say that there are three layers, with the last one's key beside them by which the kind is detected.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from families import FLUX_SCHNELL
from inside import Request, comfy_sd, relative, save_file
from test_host_lengths import Latents, comfy_sample, made, prompt_sets

text = importlib.import_module("qsched_pack.nodes.host.weights.text")
LAYERS, HEADS, HEAD, FF = 3, 2, 8, 64
SHORT = "a red circle above a blue ring"
LONG = ", ".join(f"object number {number} of a long list" for number in range(60))
CONFIGS = {
    "t5xxl_model_config": {"num_layers": LAYERS, "num_heads": HEADS, "d_kv": HEAD, "d_ff": FF},
    "model_config": {"num_hidden_layers": LAYERS, "intermediate_size": FF},  # of CLIP-L and CLIP-G
}
# Relative distance of the encoding, random weights; nf4: a third above the .334 that was measured.
DISTANCE = {"int8": 0.03, "nf4": 0.45}


def t5() -> dict[str, torch.Tensor]:
    """T5-XXL v1.1's keys: gated feed-forward, one table of relative positions."""
    random, inner = torch.Generator().manual_seed(1), HEADS * HEAD

    def linear(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).half()

    state = {"shared.weight": torch.randn(32128, 4096, generator=random).half()}
    for index in range(LAYERS):
        block = f"encoder.block.{index}.layer"
        for name in "qkv":
            state[f"{block}.0.SelfAttention.{name}.weight"] = linear(inner, 4096)
        state[f"{block}.0.SelfAttention.o.weight"] = linear(4096, inner)
        for name in ("wi_0", "wi_1"):
            state[f"{block}.1.DenseReluDense.{name}.weight"] = linear(FF, 4096)
        state[f"{block}.1.DenseReluDense.wo.weight"] = linear(4096, FF)
        for part in (0, 1):
            state[f"{block}.{part}.layer_norm.weight"] = torch.ones(4096).half()
    bias = torch.randn(32, HEADS, generator=random).half()
    state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    state["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"] = linear(10240, 1)
    return state | {"encoder.final_layer_norm.weight": torch.ones(4096).half()}


def clip(width: int, last: int) -> dict[str, torch.Tensor]:
    """The text tower of CLIP-L (768) or CLIP-G (1280), in the published keys."""
    random, prefix = torch.Generator().manual_seed(width), "text_model"

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).half()

    state = {
        f"{prefix}.embeddings.token_embedding.weight": draw(49408, width),
        f"{prefix}.embeddings.position_embedding.weight": draw(77, width),
        "text_projection.weight": draw(width, width),
    }
    norms = [f"{prefix}.final_layer_norm"]
    for index in sorted({*range(LAYERS), last}):
        layer = f"{prefix}.encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        shapes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, shape in (shapes | {"mlp.fc1": (FF, width), "mlp.fc2": (width, FF)}).items():
            state[f"{layer}.{name}.weight"] = draw(*shape)
            state[f"{layer}.{name}.bias"] = torch.zeros(shape[0]).half()
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.ones(width).half(),
            torch.zeros(width).half(),
        )
    return state


FILES = {"t5": t5, "l": lambda: clip(768, 1), "g": lambda: clip(1280, 30)}
# linear layers of each tower, and those that stay (projections are heads)
LINEAR = {"t5": 7 * LAYERS, "l": 6 * LAYERS, "g": 6 * LAYERS}
KINDS = {"flux": ("FLUX", ("l", "t5")), "sd3": ("SD3", ("l", "g", "t5")), "t5": ("SD3", ("t5",))}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Callable:
    """``encoder(kind)``: a CLIP as ComfyUI's Dual- and TripleCLIPLoader load it."""
    folder, found = tmp_path_factory.mktemp("encoders"), {}

    def path(name: str):
        return folder / f"{name}.safetensors"

    def loaded(kind: str):
        if kind not in found:
            clip_type, towers = KINDS[kind]
            for name in towers:
                if not path(name).exists():
                    save_file(FILES[name](), path(name))
            found[kind] = comfy_sd.load_clip(
                [str(path(name)) for name in towers],
                clip_type=getattr(comfy_sd.CLIPType, clip_type),
                model_options=dict(CONFIGS),
            )
        return found[kind]

    return loaded


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
