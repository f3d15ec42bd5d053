"""The user's override of formats by layer name: read, checked, and matched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..text import shown
from .base import FormatError
from .registry import FORMATS

KEEP = ("fp16", "bf16", "keep")  # what a user may write to leave a layer as the file has it
KINDS = ("linear", "conv2d")
# More than a person writes: a text out of a workflow is read before anything else of it runs.
MAX_TEXT, MAX_PATTERNS, MAX_PATTERN, MAX_WILDCARDS = 16384, 512, 256, 16


@dataclass(frozen=True)
class Override:
    """One clause of the user's override: layers that match any pattern get ``format`` (None: keep)."""

    patterns: tuple[str, ...]
    format: str | None

    def matches(self, name: str, kind: str = "linear") -> bool:
        return any(_matches(pattern, name, kind) for pattern in self.patterns)


def _is_glob(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern or "[" in pattern


def _matches(pattern: str, name: str, kind: str) -> bool:
    if pattern.startswith("@"):
        return pattern == f"@{kind}"
    if _is_glob(pattern):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."  # one or more whole dotted parts


def parse_overrides(text: str) -> tuple[Override, ...]:
    """``img_in|final_layer=fp16; *mlp*=nf4``: clauses parted by ";", the last that matches wins.

    A pattern is a shell pattern for the whole layer name, or, without wildcards, whole parts of it,
    or ``@linear`` or ``@conv2d`` for every layer of that kind.
    FormatError names the first clause that can't be read, and refuses texts, patterns and numbers
    of them that are larger than anyone writes.
    """
    if len(text) > MAX_TEXT:
        raise FormatError(
            f"layers has {len(text)} characters; at most {MAX_TEXT} are read: use wildcards"
        )
    overrides, count = [], 0
    for clause in filter(None, (c.strip() for c in re.split(r"[;\n]", text))):
        override = _clause(clause)
        count += len(override.patterns)
        if count > MAX_PATTERNS:
            raise FormatError(
                f"layers has more than {MAX_PATTERNS} patterns, from {shown(clause)} on; "
                "use wildcards"
            )
        overrides.append(override)
    return tuple(overrides)


def _clause(clause: str) -> Override:
    patterns, equals, value = (part.strip() for part in clause.rpartition("="))
    names = tuple(p.strip() for p in patterns.split("|"))
    said = f"layers: {shown(clause)}"
    if not equals or not all(names):
        raise FormatError(
            f"layers: can't read {shown(clause)}; write it as PATTERN=FORMAT, several patterns with "
            "|, several clauses with ;"
        )
    _check_patterns(said, names)
    if value not in FORMATS and value not in KEEP:
        raise FormatError(
            f"{said} asks for the format {shown(value)}; choose one of "
            f"{', '.join((*FORMATS, *KEEP))}"
        )
    unserved = [p for p in names if p.startswith("@") and value in FORMATS]
    unserved = [p for p in unserved if p[1:] not in FORMATS[value].kinds]
    if unserved:
        able = ", ".join(n for n, f in FORMATS.items() if unserved[0][1:] in f.kinds)
        raise FormatError(f"{said}: {value} can't store {unserved[0]} layers; choose one of {able}")
    return Override(names, None if value in KEEP else value)


def _check_patterns(said: str, names: Sequence[str]) -> None:
    for name in names:
        if re.search(r"[\s=,]", name):
            raise FormatError(f"{said} has a space, comma or = inside a pattern")
        if len(name) > MAX_PATTERN:
            raise FormatError(
                f"{said} has a pattern of {len(name)} characters; at most {MAX_PATTERN} are read"
            )
        if sum(map(name.count, "*?[")) > MAX_WILDCARDS:
            raise FormatError(
                f"{said} has a pattern with more than {MAX_WILDCARDS} wildcards; write fewer"
            )
        if name.startswith("@") and name[1:] not in KINDS:
            raise FormatError(
                f"{said} names the kind {shown(name)}; there are "
                f"{' and '.join('@' + k for k in KINDS)}"
            )


def unmatched(overrides: Sequence[Override], layers: Mapping[str, str]) -> Iterator[str]:
    """The patterns that match none of ``layers`` (name: kind), in their order."""
    kinds, joined = {f"@{kind}" for kind in layers.values()}, "\n".join(f".{n}." for n in layers)
    for pattern in (pattern for override in overrides for pattern in override.patterns):
        if _is_glob(pattern):
            found = any(fnmatchcase(name, pattern) for name in layers)
        else:
            found = pattern in kinds or f".{pattern}." in joined
        if not found:
            yield pattern
