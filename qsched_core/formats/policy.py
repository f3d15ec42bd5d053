"""Which layer gets which format: sound defaults by layer name, and the user's overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import overrides as by_name
from .base import FormatError
from .overrides import Override, parse_overrides
from .registry import get

# Parts of a layer's name, between dots.  An embedder turns inputs into features, a head features
# into outputs: both are small, and their errors reach every later layer or the picture itself.
EMBEDDERS = frozenset(
    (
        "x_embedder", "context_embedder", "cap_embedder", "t_embedder", "y_embedder", "pos_embed",
        "pos_embedder", "patch_embed", "patch_embedding", "text_embedding", "time_embedding",
        "time_projection", "time_embed", "label_emb", "time_text_embed", "img_emb",
        "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "text_projection", "lm_head",
    )
)  # fmt: skip
FIRST_LAYERS = ("input_blocks.0.0", "conv_in")  # of UNets: what turns the latent into features
# The first part of a head's name; inside a block "proj_out" and "out" are ordinary projections.
HEADS = frozenset(
    ("final_layer", "final_linear", "norm_out", "head", "proj_out", "out", "conv_out")
)
# A modulation layer sees one vector, nearly the same for every prompt: rounding it is a systematic
# error of the whole layer.
MODULATION = re.compile(
    r"(^|[._])(adaln|ada_ln|modulation|img_mod|txt_mod|emb_layers|time_emb_proj)([._]|$)"
    r"|(^|\.)norm\d?(_context|_out)?\.linear$",
    re.IGNORECASE,
)
MODULATION_FORMAT = {"int2": "nf4", "int3": "nf4"}  # fewer than 4 bits are too few there


@dataclass(frozen=True)
class Choice:
    """How one layer is stored, and whether it runs with its activations as they are.

    ``format`` is None for a layer that stays as it is; ``why`` then says why, in a few words.
    """

    format: str | None
    weight_only: bool = False
    why: str = ""


@dataclass(frozen=True)
class Policy:
    """The format of every layer of a model.

    ``format`` is the base format, ``overrides`` what the user wants otherwise.  Embedders and heads
    stay as they are; modulation layers keep their activations, and get 4 bits where the base format
    has fewer, or the format ``modulation``; layers with fewer than ``min_weights`` weights are not
    worth it.  ``weight_only``: every layer keeps its activations.
    """

    format: str
    overrides: tuple[Override, ...] = ()
    min_weights: int = 4096
    weight_only: bool = False
    modulation: str | None = None

    def __post_init__(self):
        get(self.format)
        get(self.for_modulation)
        if self.min_weights < 0:
            raise FormatError(f"min_weights={self.min_weights} must not be negative")

    @property
    def for_modulation(self) -> str:
        return self.modulation or MODULATION_FORMAT.get(self.format, self.format)

    def __call__(self, name: str, shape: tuple[int, ...], kind: str = "linear") -> Choice:
        """The choice for layer ``name`` (without ".weight") of weight ``shape``."""
        modulation = is_modulation(name)
        weight_only = modulation or self.weight_only
        for override in reversed(self.overrides):
            if override.matches(name, kind):
                if override.format is None:
                    return Choice(None, why="kept by layers")
                return _fitting(override.format, shape, weight_only)
        if is_embedder(name) or is_head(name):
            return Choice(None, why="embedder or head")
        if math.prod(shape) < self.min_weights:
            return Choice(None, why="small")
        form = self.for_modulation if modulation else self.format
        return _fitting(form, shape, weight_only)

    def formats(self) -> tuple[str, ...]:
        """Every format that a layer may get."""
        chosen = {self.format, self.for_modulation}
        return tuple(sorted(chosen | {o.format for o in self.overrides if o.format is not None}))

    def unmatched(self, layers: Mapping[str, str]) -> list[str]:
        """The patterns of the overrides that match none of the model's layers (name: kind)."""
        return list(by_name.unmatched(self.overrides, layers))

    def describe(self) -> str:
        """One line that a schedule's provenance can carry and ``parse_overrides`` can read."""
        return "; ".join(f"{'|'.join(o.patterns)}={o.format or 'keep'}" for o in self.overrides)


def _fitting(form: str, shape: tuple[int, ...], weight_only: bool) -> Choice:
    """The choice of ``form``, or of keeping the layer if its shape does not fit."""
    reason = get(form).unfit(shape)
    return Choice(form, weight_only) if reason is None else Choice(None, why=reason)


def is_embedder(name: str) -> bool:
    return name in FIRST_LAYERS or any(part in EMBEDDERS for part in name.split("."))


def is_head(name: str) -> bool:
    return name.split(".")[0] in HEADS


def is_modulation(name: str) -> bool:
    return MODULATION.search(name) is not None


__all__ = ["Choice", "Override", "Policy", "parse_overrides"]
