"""Reading scorers' weights from files, and open_clip models out of plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .base import Placement, ScorerError, stay

# CLIP's own normalisation, which LAION's models, HPS and PickScore kept
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH, HUGE_WIDTH, HUGE_HEAD_WIDTH = 64, 1280, 80  # ViT-H has wider heads than all others
WRAPPERS = ("state_dict", "model")

Weights = dict[str, torch.Tensor]


def read_weights(path: Path) -> Weights:
    """The tensors of a .safetensors file, or of a state dict that torch saved.

    ScorerError for a file that can't be read, that holds something else, or that has NaN weights.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                weights: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch and safetensors report unreadable files with many exception types
        raise ScorerError(
            f"{path.name} can't be read as weights: {str(error).strip().splitlines()[0]}; get the "
            "file again, as safetensors or a plain state dict"
        ) from error
    for name in WRAPPERS:
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise ScorerError(f"{path.name} holds no state dict; use a file of plain weights")
    found = {name.removeprefix("module."): value for name, value in weights.items()}
    for name, value in found.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ScorerError(f"{path.name}: {name} has NaN or infinite values; get the file again")
    return found


def clip_config(weights: Weights, file: str) -> dict[str, Any]:
    """open_clip's configuration of the ViT dual encoder whose weights these are, by their shapes.

    ScorerError, naming ``file``, where they are another model's.
    """
    try:
        patches = weights["visual.conv1.weight"]
        places = weights["visual.positional_embedding"]
        context, text_width = weights["positional_embedding"].shape
        vocabulary = weights["token_embedding.weight"].shape[0]
        embed = weights["text_projection"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise ScorerError(
            f"{file} is no CLIP model with a vision transformer in open_clip's keys ({error} is "
            "missing); check that it is the scorer's own file"
        ) from None
    width, _, patch, _ = patches.shape
    grid = round((places.shape[0] - 1) ** 0.5)
    return {
        "embed_dim": embed,
        "vision_cfg": {
            "image_size": grid * patch,
            "layers": _layers(weights, "visual.transformer.resblocks."),
            "width": width,
            "patch_size": patch,
            "head_width": HUGE_HEAD_WIDTH if width == HUGE_WIDTH else min(HEAD_WIDTH, width),
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(1, text_width // HEAD_WIDTH),
            "layers": _layers(weights, "transformer.resblocks."),
        },
    }


def _layers(weights: Weights, prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)}
    return len(numbers)


def encoder_of(weights: Weights, source: dict[str, Any], file: str, place: Placement = stay):
    """A DualEncoder with these weights, in open_clip's keys; ScorerError where they don't fit."""
    from ..optional import require
    from .open_clip import FEATURE, INSTALL, DualEncoder

    open_clip = require("open_clip", FEATURE, INSTALL)
    config = clip_config(weights, file)
    model = open_clip.CLIP(**config)
    try:
        missing, unknown = model.load_state_dict(
            {name: value.float() for name, value in weights.items()}, strict=False
        )
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1].strip()
        raise ScorerError(f"{file} does not fit the model its shapes name: {line}") from None
    if missing:
        raise ScorerError(f"{file} lacks {len(missing)} weights, such as {missing[0]}")
    if [name for name in unknown if not name.endswith("position_ids")]:
        raise ScorerError(f"{file} has {len(unknown)} weights of no CLIP model: {unknown[0]}")
    size = config["vision_cfg"]["image_size"]
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    preprocess = {"size": size, "mean": CLIP_MEAN, "std": CLIP_STD}
    return DualEncoder(model, tokenizer, preprocess, source, place)


_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_SINGLE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "vision_model.pre_layrnorm": "visual.ln_pre",  # transformers' own spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}


def from_huggingface(weights: Weights, file: str) -> Weights:
    """The weights of a transformers CLIPModel in open_clip's keys.

    Queries, keys and values are joined, projections transposed.  ScorerError, naming ``file``, for a
    key that no CLIPModel has.
    """
    found: Weights = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if name.endswith("position_ids"):
            continue
        if name in _SINGLE:
            found[_SINGLE[name]] = value
        elif name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = value.T.contiguous()
        elif stem in _NORMS:
            found[f"{_NORMS[stem]}.{kind}"] = value
        else:
            tower, _, rest = name.partition(".encoder.layers.")
            number, _, inner = rest.partition(".")
            prefix = {"vision_model": "visual.", "text_model": ""}.get(tower)
            if prefix is None or not inner:
                raise ScorerError(f"{file}: {name} is no weight of a transformers CLIPModel")
            block = f"{prefix}transformer.resblocks.{number}"
            part, _, kind = inner.rpartition(".")
            if part in _BLOCK:
                found[f"{block}.{_BLOCK[part]}.{kind}"] = value
            elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                joined.setdefault(f"{block}.attn.in_proj_{kind}", {})[part[10]] = value
            else:
                raise ScorerError(f"{file}: {name} is no weight of a transformers CLIPModel")
    for name, parts in joined.items():
        if set(parts) != set("qkv"):
            raise ScorerError(f"{file}: {name} has only {sorted(parts)} of q, k and v")
        found[name] = torch.cat([parts[letter] for letter in "qkv"])
    return found
