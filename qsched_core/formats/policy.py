"""Which layer gets which format: sound defaults by layer name, and the user's overrides."""

from __future__ import annotations

import re
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
        "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
    )
)  # fmt: skip
# The first part of a head's name; inside a block "proj_out" and "out" are ordinary projections.
HEADS = frozenset(("final_layer", "final_linear", "norm_out", "head", "proj_out", "out"))
# A modulation layer sees one vector, nearly the same for every prompt: rounding it is a systematic
# error of the whole layer.
MODULATION = re.compile(
    r"(^|[._])(adaln|ada_ln|modulation|img_mod|txt_mod|emb_layers|time_emb_proj)([._]|$)"
    r"|(^|\.)norm\d?(_context|_out)?\.linear$",
    re.IGNORECASE,
)
MODULATION_FORMAT = {"int2": "nf4"}  # fewer than 4 bits are too few there
KEEP = ("fp16", "bf16", "keep")  # what a user may write to leave a layer as the file has it


@dataclass(frozen=True)
class Choice:
    """How one layer is stored, and whether it runs with its activations as they are."""

    format: str
    weight_only: bool = False


@dataclass(frozen=True)
class Override:
    """One clause of the user's override: layers that match any pattern get ``format`` (None: keep)."""

    patterns: tuple[str, ...]
    format: str | None

    def matches(self, name: str) -> bool:
        return any(
            fnmatchcase(name, p) if "*" in p or "?" in p or "[" in p else _is_part(p, name)
            for p in self.patterns
        )


def _is_part(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is one or more whole dotted parts of ``name``."""
    return f".{pattern}." in f".{name}."


def parse_overrides(text: str) -> tuple[Override, ...]:
    """``img_in|final_layer=fp16; *mlp*=nf4``: clauses parted by ";", the last that matches wins.

    A pattern is a shell pattern for the whole layer name, or, without wildcards, whole parts of it.
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
        if value not in FORMATS and value not in KEEP:
            raise FormatError(
                f"layers: {clause!r} asks for the format {value!r}; "
                f"choose one of {', '.join((*FORMATS, *KEEP))}"
            )
        overrides.append(Override(names, None if value in KEEP else value))
    return tuple(overrides)


@dataclass(frozen=True)
class Policy:
    """The format of every layer of a model.

    ``format`` is the base format, ``overrides`` what the user wants otherwise.  Embedders and heads
    stay as they are; modulation layers keep their activations, and get 4 bits where the base format
    has fewer; layers with fewer than ``min_weights`` weights are not worth it.
    """

    format: str
    overrides: tuple[Override, ...] = ()
    min_weights: int = 4096

    def __post_init__(self):
        get(self.format)
        if self.min_weights < 0:
            raise FormatError(f"min_weights={self.min_weights} must not be negative")

    def __call__(self, name: str, shape: tuple[int, ...], kind: str = "linear") -> Choice | None:
        """The choice for layer ``name`` (without ".weight") of weight ``shape``; None keeps it."""
        if kind != "linear" or len(shape) != 2:
            return None
        modulation = is_modulation(name)
        for override in reversed(self.overrides):
            if override.matches(name):
                return None if override.format is None else Choice(override.format, modulation)
        if is_embedder(name) or is_head(name) or shape[0] * shape[1] < self.min_weights:
            return None
        if modulation:
            return Choice(MODULATION_FORMAT.get(self.format, self.format), weight_only=True)
        return Choice(self.format)

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns of the overrides that match none of the model's layers."""
        return [
            pattern
            for override in self.overrides
            for pattern in override.patterns
            if not any(Override((pattern,), None).matches(name) for name in names)
        ]

    def describe(self) -> str:
        """One line that a schedule's provenance can carry and ``parse_overrides`` can read."""
        return "; ".join(f"{'|'.join(o.patterns)}={o.format or 'keep'}" for o in self.overrides)


def is_embedder(name: str) -> bool:
    return any(part in EMBEDDERS for part in name.split("."))


def is_head(name: str) -> bool:
    return name.split(".")[0] in HEADS


def is_modulation(name: str) -> bool:
    return MODULATION.search(name) is not None
