"""The format for a user who leaves the choice to us, and what a user sees of each format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from .base import FormatError
from .policy import Policy, parse_overrides
from .registry import FORMATS, get

RECOMMENDED = "recommended"  # in a format's place
# From the nearest to the unquantized model to the smallest; fewer bits than three need weights that
# were calibrated.
LADDER = ("int8_convrot", "int8", "nf4", "int3")


@dataclass(frozen=True)
class Weight:
    """What counts of a weight before it is quantized: its shape, and the bytes it takes now."""

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Recommendation:
    """A format, the bytes that a model takes in it, and the bytes that were free for it."""

    format: str
    nbytes: int
    memory: int
    device: str

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.memory

    def describe(self) -> str:
        size, free = (_size(n) for n in (self.nbytes, self.memory))
        text = f"recommended: {self.format}, about {size} of {free} free on {self.device}"
        if self.fits:
            return text
        return f"{text}; more than is free, so ComfyUI keeps a part in system memory"


def recommend(
    weights: Mapping[str, Weight], layers: str, device: torch.device | str, memory: int
) -> Recommendation:
    """The most precise format of :data:`LADDER` that runs on ``device`` and fits into ``memory``.

    ``weights`` are a model's by layer name, without ".weight"; ``layers`` the user's overrides.
    Where none fits it is the smallest.  FormatError for overrides that can't be read.
    """
    device = torch.device(device)
    found = None
    for name in runnable(device):
        policy = Policy(name, parse_overrides(layers))
        found = Recommendation(name, _bytes(weights, policy), memory, str(device))
        if found.fits:
            return found
    if found is None:
        raise FormatError(
            f"weight_format={RECOMMENDED}: none of {', '.join(LADDER)} runs on {device}; choose one"
        )
    return found


def runnable(device: torch.device | str) -> list[str]:
    """The formats of :data:`LADDER` that run on ``device``."""
    return [name for name in LADDER if get(name).available(device) is None]


def _bytes(weights: Mapping[str, Weight], policy: Policy) -> int:
    """Bytes of a model under ``policy``."""
    total = 0
    for name, weight in weights.items():
        kind = {2: "linear", 4: "conv2d"}.get(len(weight.shape))
        form = None if kind is None else policy(name, weight.shape, kind).format
        total += weight.nbytes if form is None else _packed(form, weight.shape)
    return total


@lru_cache(maxsize=4096)  # a model has many layers of few shapes
def _packed(form: str, shape: tuple[int, ...]) -> int:
    return get(form).packed_bytes(shape)


def _size(nbytes: int) -> str:
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{max(nbytes, 0) / unit:.1f} {name}"


def ordered(device: torch.device | str) -> tuple[str, ...]:
    """Every format's name: those that run on ``device`` first."""
    return tuple(sorted(FORMATS, key=lambda name: get(name).available(device) is not None))


def table(device: torch.device | str, names: Iterable[str] | None = None) -> str:
    """A line for each format: bits a weight, what to expect, and why it can't run on ``device``.

    Of ``names``; None: of all of them.
    """
    lines = []
    for form in map(get, ordered(device) if names is None else names):
        text = f"{form.name}: {form.bits:g} bits, {form.word}. {form.title}."
        reason = form.available(device)
        if reason is not None:
            text = f"{text} NOT HERE: {first_clause(reason, form.name)}."
        lines.append(text)
    return "\n".join(lines)


def first_clause(reason: str, name: str) -> str:
    """What a format needs, without what would run instead: ``needs an sm_89 or newer GPU``."""
    return reason.partition(";")[0].removeprefix(f"{name} ").rstrip(".")
