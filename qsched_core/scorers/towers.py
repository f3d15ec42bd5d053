"""open_clip models out of plain numbers: what a file may ask for, and how large it may be.

A file's own description is a stranger's text.  open_clip would download what some of its entries
name, and allocate whatever its numbers say.  So a description holds numbers within bounds and nothing
else, and a model is built only when the file has the weights for every part of it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..text import said
from .base import ScorerError

VOCABULARY = 49408  # of CLIP's own tokenizer, the one that open_clip brings with it
MAX_PATCHES = 1 << 14  # of an image: attention takes their square


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high``, or a list of ``several`` of them."""

    low: float
    high: float
    whole: bool = True
    several: int = 0

    def __call__(self, value: object) -> bool:
        if self.several and isinstance(value, list):
            return len(value) == self.several and all(map(self._one, value))
        return self._one(value)

    def _one(self, value: object) -> bool:
        types = (int,) if self.whole else (int, float)
        return type(value) in types and self.low <= value <= self.high

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        lists = f", or {self.several} of them" if self.several else ""
        return f"a {kind} from {self.low:g} to {self.high:g}{lists}"


@dataclass(frozen=True)
class OneOf:
    """One of some plain values."""

    values: tuple[str | bool, ...]

    def __call__(self, value: object) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


Rules = Mapping[str, Number | OneOf | Mapping]
FLAG = OneOf((True, False))
WIDTH, LAYERS, HEADS = Number(1, 8192), Number(1, 128), Number(1, 256)
FRACTION = Number(0, 1, whole=False)
SIDE = Number(1, 2048, several=2)
BLOCKS: Rules = {
    "mlp_ratio": Number(0.01, 16, whole=False),
    "ls_init_value": FRACTION,
    "final_ln_after_pool": FLAG,
    "norm_kwargs": {"eps": FRACTION},
    "act_kwargs": {"approximate": OneOf(("none", "tanh"))},
    "block_type": OneOf(("default", "custom")),
    "qk_norm": FLAG,
    "scaled_cosine_attn": FLAG,
    "scale_heads": FLAG,
    "scale_attn_inner": FLAG,
    "scale_attn": FLAG,
    "scale_fc": FLAG,
}
VISION: Rules = {
    **BLOCKS,
    "image_size": SIDE,
    "patch_size": Number(1, 256, several=2),
    "width": WIDTH,
    "layers": Number(1, 128, several=4),  # four of them: a ResNet's stages
    "head_width": Number(1, 1024),
    "patch_dropout": FRACTION,
    "attentional_pool": FLAG,
    "attn_pooler_queries": Number(1, 4096),
    "attn_pooler_heads": HEADS,
    "no_ln_pre": FLAG,
    "pos_embed_type": OneOf(("learnable", "sin_cos_2d")),
    "pool_type": OneOf(("tok", "avg")),
    "output_tokens": OneOf((False,)),
}
TEXT: Rules = {
    **BLOCKS,
    "context_length": Number(1, 1024),
    "vocab_size": Number(VOCABULARY, VOCABULARY),
    "width": WIDTH,
    "heads": HEADS,
    "layers": LAYERS,
    "pad_id": Number(0, VOCABULARY),
    "eos_id": Number(0, VOCABULARY),
    "embed_cls": OneOf((False,)),
    "no_causal_mask": FLAG,
    "pool_type": OneOf(("first", "last", "argmax", "eos")),
    "proj_bias": FLAG,
    "proj_type": OneOf(("linear", "none")),
    "output_tokens": OneOf((False,)),
}
MODEL: Rules = {
    "embed_dim": WIDTH,
    "vision_cfg": VISION,
    "text_cfg": TEXT,
    "quick_gelu": FLAG,
    "init_logit_scale": Number(-100, 100, whole=False),
    "init_logit_bias": Number(-100, 100, whole=False),
    "nonscalar_logit_scale": FLAG,
}
NEEDED = ("embed_dim", "vision_cfg", "text_cfg")
PREPROCESS: Rules = {
    "size": SIDE,
    "mean": Number(-1000, 1000, whole=False, several=3),
    "std": Number(1e-6, 1000, whole=False, several=3),
    "resize_mode": OneOf(("shortest", "squash")),
}
FETCHED = ("hf_", "timm_", "tokenizer_", "pretrained")  # entries that name things of a hub


def checked_config(found: Any, file: str) -> dict[str, Any]:
    """open_clip's configuration ``found`` in ``file``, if it is plain numbers within bounds.

    ScorerError names the entry that is not, and what may stand there.
    """
    config = _checked(found, MODEL, "model_cfg", file)
    for name in NEEDED:
        if name not in config:
            raise _no_model(file, f"model_cfg has no {name!r}")
    image, patch = (
        _pair(config["vision_cfg"].get(name, default))
        for name, default in (("image_size", 224), ("patch_size", 16))
    )
    patches = math.prod(side // part for side, part in zip(image, patch, strict=True))
    if not 1 <= patches <= MAX_PATCHES:
        raise _no_model(
            file,
            f"image_size {image} in patches of {patch} gives {patches}, not 1 to {MAX_PATCHES}",
        )
    return config


def checked_preprocess(found: Any, config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """How images are made ready for the model of ``config``; ScorerError as above."""
    if not isinstance(found, Mapping):
        raise _no_model(file, "preprocess_cfg is no object")
    known = {name: value for name, value in found.items() if name in PREPROCESS}
    preprocess = _checked(known, PREPROCESS, "preprocess_cfg", file)
    for name in ("mean", "std"):
        if not isinstance(preprocess.get(name), list):
            raise _no_model(file, f"preprocess_cfg has no {name!r} of three numbers")
    size = config["vision_cfg"].get("image_size", 224)
    if _pair(preprocess.setdefault("size", size)) != _pair(size):
        raise _no_model(file, f"preprocess_cfg's size is {preprocess['size']}, image_size {size}")
    return preprocess


def _checked(found: Any, rules: Rules, place: str, file: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise _no_model(file, f"{place} is no object")
    checked: dict[str, Any] = {}
    for name, value in found.items():
        rule, where = rules.get(name), f"{place}.{name[:60]!r}"
        if value is None:  # open_clip's own default
            continue
        if rule is None and name.startswith(FETCHED):
            raise ScorerError(
                f"{file}: {where} names a part that open_clip would fetch; a file's description "
                "holds plain numbers: set architecture to open_clip's name of the model instead"
            )
        if rule is None:
            raise _no_model(file, f"{where} is unknown")
        if isinstance(rule, Mapping):
            checked[name] = _checked(value, rule, f"{place}.{name}", file)
        elif rule(value):
            checked[name] = copy.copy(value)
        else:
            raise _no_model(file, f"{where} is {repr(value)[:60]}; it must be {rule}")
    return checked


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _no_model(file: str, reason: str) -> ScorerError:
    return ScorerError(
        f"{file} does not describe an open_clip model ({reason}); give the architecture instead"
    )


def build(
    open_clip, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], file: str, what: str
) -> torch.nn.Module:
    """open_clip's CLIP of ``config`` with ``weights``.

    ScorerError, naming ``file`` and ``what`` the configuration is from, where they don't fit.
    Memory is taken only for weights that are there: the shapes are compared first.
    """
    try:
        with torch.device("meta"):
            plan = open_clip.CLIP(**copy.deepcopy(dict(config))).state_dict()
    except Exception as error:
        # open_clip and torch refuse numbers that do not go together with many exception types
        raise ScorerError(f"{file}: open_clip can't build {what}: {said(error)}") from error
    found = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    lacking = [name for name in plan if name not in found]
    if lacking:
        raise ScorerError(
            f"{file} does not fit {what}: it lacks {len(lacking)} weights, such as {lacking[0]}"
        )
    unknown = [name for name in found if name not in plan]
    if unknown:
        raise ScorerError(
            f"{file} does not fit {what}: it has {len(unknown)} weights of no such model, such as "
            f"{unknown[0][:120]!r}"
        )
    for name, value in plan.items():
        if found[name].shape != value.shape:
            raise ScorerError(
                f"{file} does not fit {what}: {name} has the shape {list(found[name].shape)}, not "
                f"{list(value.shape)}"
            )
    model = open_clip.CLIP(**copy.deepcopy(dict(config)))
    model.load_state_dict({name: value.float() for name, value in found.items()})
    return model


def fetched_parts(open_clip, architecture: str) -> list[str]:
    """What open_clip fetches from a hub to build its model ``architecture`` around a weights file."""
    config = open_clip.get_model_config(architecture) or {}
    found = []
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name, value in part.items():
            names_hub = name in ("hf_model_name", "hf_tokenizer_name")
            if value and (names_hub or (name == "timm_model_name" and ":" in value)):
                found.append(value)
    if not found and "siglip" in architecture.lower():
        found.append("SigLIP's tokenizer")
    return list(dict.fromkeys(found))


def head_counts(open_clip) -> tuple[dict[int, int], dict[int, int]]:
    """Attention heads by width, of image towers and of text towers, as open_clip's models have them.

    Weights don't show the count.  A width is left out if no model has it, or if
    models of that width differ.
    """
    vision: dict[int, set[int]] = defaultdict(set)
    text: dict[int, set[int]] = defaultdict(set)
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        image, words = config["vision_cfg"], config["text_cfg"]
        if not image.get("timm_model_name") and isinstance(image.get("layers", 12), int):
            width = image.get("width", 768)
            vision[width].add(width // image.get("head_width", 64))
        if not words.get("hf_model_name"):
            text[words.get("width", 512)].add(words.get("heads", 8))
    return tuple(
        {width: next(iter(counts)) for width, counts in found.items() if len(counts) == 1}
        for found in (vision, text)
    )
