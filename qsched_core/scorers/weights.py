"""Reading scorers' weights from files, and open_clip models out of plain weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..text import said
from .base import Placement, ScorerError, stay
from .towers import VOCABULARY, build, checked_config, head_counts

# CLIP's own normalisation, which LAION's models, HPS and PickScore kept
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
            f"{path.name} can't be read as weights: {said(error)}; get the file again, as "
            "safetensors or a plain state dict"
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
        if not _is_stored(value):
            raise ScorerError(f"{path.name}: {name} is larger than what is stored of it")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ScorerError(f"{path.name}: {name} has NaN or infinite values; get the file again")
    return found


def _is_stored(value: torch.Tensor) -> bool:
    """Whether the file holds every element of ``value``: a small file can declare a huge tensor."""
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def clip_config(open_clip, weights: Weights, file: str) -> dict[str, Any]:
    """open_clip's configuration of the ViT dual encoder whose weights these are, by their shapes.

    The number of heads is what open_clip's models of that width have.  ScorerError, naming ``file``,
    for another model's weights, and for a width that no model of open_clip has.
    """
    try:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        places = weights["visual.positional_embedding"].shape[0]
        context, text_width = weights["positional_embedding"].shape
        vocabulary = weights["token_embedding.weight"].shape[0]
        embed = weights["text_projection"].shape[1]
        ratios = [
            _ratio(weights[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"].shape)
            for tower in ("visual.", "")
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise ScorerError(
            f"{file} is no CLIP model with a vision transformer in open_clip's keys ({error} is "
            "missing); check that it is the scorer's own file"
        ) from None
    vision_heads, text_heads = head_counts(open_clip)
    for tower, found, known in (("image", width, vision_heads), ("text", text_width, text_heads)):
        if found not in known:
            raise ScorerError(
                f"{file}: its {tower} tower is {found} wide, and its weights don't show how many "
                f"heads it has; the widths of known models are {', '.join(map(str, sorted(known)))}"
            )
    if vocabulary != VOCABULARY:
        raise ScorerError(
            f"{file} has a vocabulary of {vocabulary} tokens; CLIP's own tokenizer has {VOCABULARY}: "
            "use a file that was made with it"
        )
    config = {
        "embed_dim": embed,
        "vision_cfg": {
            "image_size": math.isqrt(max(0, places - 1)) * patch,
            "layers": _layers(weights, "visual.transformer.resblocks."),
            "width": width,
            "patch_size": patch,
            "head_width": width // vision_heads[width],
            "mlp_ratio": ratios[0],
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": text_heads[text_width],
            "layers": _layers(weights, "transformer.resblocks."),
            "mlp_ratio": ratios[1],
        },
    }
    return checked_config(config, file)


def _ratio(shape) -> float:
    """The ratio of a [hidden, width] matrix that open_clip rounds down to these whole numbers."""
    hidden, width = shape
    return (hidden + 0.5) / width


def _layers(weights: Weights, prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)}
    return len(numbers)


def encoder_of(weights: Weights, source: dict[str, Any], file: str, place: Placement = stay):
    """A DualEncoder with these weights, in open_clip's keys; ScorerError where they don't fit."""
    from ..optional import require
    from .open_clip import FEATURE, INSTALL, DualEncoder

    open_clip = require("open_clip", FEATURE, INSTALL)
    config = clip_config(open_clip, weights, file)
    model = build(open_clip, config, weights, file, "the model its shapes name")
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
