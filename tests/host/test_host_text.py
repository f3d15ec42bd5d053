"""Quantized text encoders inside the real ComfyUI."""

from __future__ import annotations

import importlib

import pytest
import torch
from inside import NAMES, Request, comfy_sd, relative, same_state

text = importlib.import_module("qsched_pack.nodes.host.weights.text")
# Relative distance of the encoding, random weights of CLIP-L's shapes.
DISTANCE = {"int8": 0.02, "int2": 0.6}
PROMPT = "a red circle above a blue ring"


@pytest.fixture(scope="module")
def clip():
    """SD1's text encoder (CLIP-L, 2 of its 12 layers) with random weights."""
    base = importlib.import_module("comfy.supported_models_base")
    sd1 = importlib.import_module("comfy.sd1_clip")
    torch.manual_seed(0)
    made = comfy_sd.CLIP(base.ClipTarget(sd1.SD1Tokenizer, sd1.SD1ClipModel))
    layers = made.cond_stage_model.clip_l.transformer.text_model.encoder.layers
    del layers[2:]
    made.cond_stage_model.clip_l.layer_idx = None
    for parameter in made.cond_stage_model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn_like(parameter) * scale + (parameter.ndim == 1)
    return made


def stored(model):
    return {
        k: v.detach().cpu().flatten().view(torch.uint8).clone()
        for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "name", sorted({"nf4", "w4a8", "int8", "svdquant_w4a4", "int2"} & {*NAMES})
)
def test_it_encodes_close_to_the_original_which_stays_as_it_is(name, clip):
    wanted, before = clip.encode(PROMPT), stored(clip.cond_stage_model)
    quantized = text.quantize_text_encoder(clip, Request(name))
    found = quantized.encode(PROMPT)
    assert 0 < relative(found, wanted) < DISTANCE.get(name, 0.25)
    assert torch.equal(clip.encode(PROMPT), wanted)
    assert same_state(stored(clip.cond_stage_model), before)
    assert torch.equal(quantized.clone().encode(PROMPT), found)
    info = quantized.patcher.model_options["qsched"]
    assert info["quantized_layers"] == {name: 12}
    assert info["kept_because"] == {"embedder or head": 1}, "the projection"
    assert quantized.patcher.model_size() < 0.97 * clip.patcher.model_size()


def test_loras_are_merged_before_the_rounding_or_applied_after(clip):
    torch.manual_seed(1)
    names = [k for k in clip.cond_stage_model.state_dict() if k.endswith("fc1.weight")]
    lora = {
        f"text_encoders.{k.removesuffix('.weight')}.lora_{side}.weight": torch.randn(shape) * 0.1
        for k in names
        for side, shape in (("A", (4, 768)), ("B", (3072, 4)))
    }

    def patched(model):
        return comfy_sd.load_lora_for_models(None, model, lora, 0, 1.0)[1]

    both = patched(clip)
    assert both.patcher.patches
    wanted, bare = both.encode(PROMPT), clip.encode(PROMPT)
    merged = text.quantize_text_encoder(both, Request("nf4"))
    assert not merged.patcher.patches
    assert relative(merged.encode(PROMPT), wanted) < 0.6 * relative(bare, wanted)
    after = patched(text.quantize_text_encoder(clip, Request("nf4")))
    assert relative(after.encode(PROMPT), wanted) < 0.6 * relative(bare, wanted)


def random_lora(clip, seed: int):
    """A LoRA on ``clip`` at strength 1, with weights of its own for each seed."""
    random = torch.Generator().manual_seed(seed)
    lora = {
        f"text_encoders.{k.removesuffix('.weight')}.lora_{side}.weight": torch.randn(
            shape, generator=random
        )
        for k in clip.cond_stage_model.state_dict()
        if k.endswith("fc1.weight")
        for side, shape in (("A", (4, 768)), ("B", (3072, 4)))
    }
    return comfy_sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1]


@pytest.mark.parametrize("name", ["", "nf4", "int8"])
def test_a_clips_hash_is_of_its_loras_and_not_of_what_was_encoded_before(name, clip):
    """A search that goes on must find the CLIP it had, with a LoRA in its weights by then or not."""
    found = importlib.import_module("qsched_pack.nodes.host.weights.provenance").clip_hash
    bare = text.quantize_text_encoder(clip, Request(name)) if name else clip
    first, second = random_lora(bare, 1), random_lora(bare, 2)
    before = [found(c) for c in (bare, first, second)]
    assert len(set(before)) == 3
    for used in (first, second, bare):
        used.encode(PROMPT)
        assert [found(c) for c in (bare, first, second)] == before
    assert found(random_lora(bare, 1)) == before[1]


def test_layers_can_be_chosen_and_bad_requests_are_named(clip):
    quantized = text.quantize_text_encoder(clip, Request("nf4", "*fc1=int8; *fc2=keep"))
    counts = quantized.patcher.model_options["qsched"]["quantized_layers"]
    assert counts == {"nf4": 8, "int8": 2}
    with pytest.raises(ValueError, match="matches none"):
        text.quantize_text_encoder(clip, Request("nf4", "joint_blocks=int8"))
    with pytest.raises(ValueError, match="clip is quantized already"):
        text.quantize_text_encoder(quantized, Request("nf4"))
