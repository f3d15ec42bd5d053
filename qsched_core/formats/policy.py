"""Which layer gets which format: sound defaults by layer name, and the user's overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .base import FormatError
from .registry import FORMATS, get

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
KEEP = ("fp16", "bf16", "keep")  # what a user may write to leave a layer as the file has it


KINDS = ("linear", "conv2d")


@dataclass(frozen=True)
class Choice:
    """How one layer is stored, and whether it runs with its activations as they are.

    ``format`` is None for a layer that stays as it is; ``why`` then says why, in a few words.
    """

    format: str | None
    weight_only: bool = False
    why: str = ""


@dataclass(frozen=True)
class Override:
    """One clause of the user's override: layers that match any pattern get ``format`` (None: keep)."""

    patterns: tuple[str, ...]
    format: str | None

    def matches(self, name: str, kind: str = "linear") -> bool:
        return any(_matches(pattern, name, kind) for pattern in self.patterns)


def _matches(pattern: str, name: str, kind: str) -> bool:
    if pattern.startswith("@"):
        return pattern == f"@{kind}"
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return _is_part(pattern, name)


def _is_part(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is one or more whole dotted parts of ``name``."""
    return f".{pattern}." in f".{name}."


def parse_overrides(text: str) -> tuple[Override, ...]:
    """``img_in|final_layer=fp16; *mlp*=nf4``: clauses parted by ";", the last that matches wins.

    A pattern is a shell pattern for the whole layer name, or, without wildcards, whole parts of it,
    or ``@linear`` or ``@conv2d`` for every layer of that kind.
    FormatError names the first clause that can't be read.
    """
    overrides = []
    for clause in filter(None, (c.strip() for c in re.split(r"[;\n]", text))):
        patterns, equals, value = (part.strip() for part in clause.rpartition("="))
        names = tuple(p.strip() for p in patterns.split("|"))
        if not equals or not all(names):
            raise FormatError(
                f"layers: can't read {clause!r}; write it as PATTERN=FORMAT, several patterns with |, "
                "several clauses with ;"
            )
        if any(re.search(r"[\s=,]", p) for p in names):
            raise FormatError(f"layers: {clause!r} has a space, comma or = inside a pattern")
        strange = [p for p in names if p.startswith("@") and p[1:] not in KINDS]
        if strange:
            raise FormatError(
                f"layers: {clause!r} names the kind {strange[0]!r}; there are "
                f"{' and '.join('@' + k for k in KINDS)}"
            )
        if value not in FORMATS and value not in KEEP:
            raise FormatError(
                f"layers: {clause!r} asks for the format {value!r}; "
                f"choose one of {', '.join((*FORMATS, *KEEP))}"
            )
        unserved = [p for p in names if p.startswith("@") and value in FORMATS]
        unserved = [p for p in unserved if p[1:] not in FORMATS[value].kinds]
        if unserved:
            able = ", ".join(n for n, f in FORMATS.items() if unserved[0][1:] in f.kinds)
            raise FormatError(
                f"layers: {clause!r}: {value} can't store {unserved[0]} layers; choose one of {able}"
            )
        overrides.append(Override(names, None if value in KEEP else value))
    return tuple(overrides)


@dataclass(frozen=True)
class Policy:
    """The format of every layer of a model.

    ``format`` is the base format, ``overrides`` what the user wants otherwise.  Embedders and heads
    stay as they are; modulation layers keep their activations, and get 4 bits where the base format
    has fewer; layers with fewer than ``min_weights`` weights are not worth it.  ``weight_only``:
    every layer keeps its activations.
    """

    format: str
    overrides: tuple[Override, ...] = ()
    min_weights: int = 4096
    weight_only: bool = False

    def __post_init__(self):
        get(self.format)
        if self.min_weights < 0:
            raise FormatError(f"min_weights={self.min_weights} must not be negative")

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
        form = MODULATION_FORMAT.get(self.format, self.format) if modulation else self.format
        return _fitting(form, shape, weight_only)

    def formats(self) -> tuple[str, ...]:
        """Every format that a layer may get."""
        chosen = {self.format, MODULATION_FORMAT.get(self.format, self.format)}
        return tuple(sorted(chosen | {o.format for o in self.overrides if o.format is not None}))

    def unmatched(self, layers: Mapping[str, str]) -> list[str]:
        """The patterns of the overrides that match none of the model's layers (name: kind)."""
        return [
            pattern
            for override in self.overrides
            for pattern in override.patterns
            if not any(_matches(pattern, name, kind) for name, kind in layers.items())
        ]

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
