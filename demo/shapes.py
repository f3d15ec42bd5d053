"""The demo's picture world: coloured shapes on plain backgrounds, each with one caption.

Everything here is drawn by this file; no outside picture or text is used.  A scene is a small
frozen value, so a data set is a list of scenes and a seed.  One scene in ten (chosen by a hash of
the scene) is held out of all training.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

IMAGE_SIZE = 96
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 85, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 55, 175),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
POSITIONS = {
    "in the center": (0.0, 0.0),
    "on the left": (-0.45, 0.0),
    "on the right": (0.45, 0.0),
    "at the top": (0.0, -0.45),
    "at the bottom": (0.0, 0.45),
}
SIZES = {"small": 0.24, "large": 0.44}
RELATIONS = {
    "to the left of": ((-0.46, 0.0), (0.46, 0.0)),
    "above": ((0.0, -0.46), (0.0, 0.46)),
}
KIND_WEIGHTS = {"one": 0.5, "twins": 0.1, "pair": 0.4}


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Scene:
    """One describable picture.

    ``things`` holds (colour, shape) pairs: one for ``kind`` "one" and "twins", two for "pair".
    ``where`` is a key of POSITIONS ("one"), of RELATIONS ("pair"), or "" ("twins").
    """

    kind: str
    things: tuple[tuple[str, str], ...]
    background: str
    where: str = ""
    size: str = ""

    def caption(self) -> str:
        ground = f"{article(self.background)} {self.background} background"
        colour, shape = self.things[0]
        if self.kind == "one":
            return f"a {self.size} {colour} {shape} {self.where} of {ground}"
        if self.kind == "twins":
            return f"two {colour} {shape}s on {ground}"
        colour2, shape2 = self.things[1]
        return (
            f"{article(colour)} {colour} {shape} {self.where} "
            f"{article(colour2)} {colour2} {shape2} on {ground}"
        )

    def held_out(self) -> bool:
        digest = hashlib.sha256(self.caption().encode()).digest()
        return digest[0] % 10 == 0


@cache
def all_scenes(kind: str) -> tuple[Scene, ...]:
    things = list(itertools.product(COLOURS, SHAPES))
    if kind == "one":
        return tuple(
            Scene("one", (thing,), ground, where, size)
            for thing, ground, where, size in itertools.product(things, COLOURS, POSITIONS, SIZES)
            if thing[0] != ground
        )
    if kind == "twins":
        return tuple(
            Scene("twins", (thing,), ground)
            for thing, ground in itertools.product(things, COLOURS)
            if thing[0] != ground and thing[1] != "cross"  # its plural takes more than an s
        )
    return tuple(
        Scene("pair", (first, second), ground, where)
        for first, second, ground, where in itertools.product(things, things, COLOURS, RELATIONS)
        if first != second and ground not in (first[0], second[0])
    )


@cache
def split(kind: str, held_out: bool) -> tuple[Scene, ...]:
    return tuple(scene for scene in all_scenes(kind) if scene.held_out() == held_out)


def sample_scenes(n: int, rng: np.random.Generator, held_out: bool = False) -> list[Scene]:
    """``n`` random scenes, all from the training split or all from the held-out one."""
    kinds = rng.choice(list(KIND_WEIGHTS), size=n, p=list(KIND_WEIGHTS.values()))
    pools = {kind: split(kind, held_out) for kind in KIND_WEIGHTS}
    return [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float, str, str]]:
    """Jittered (x, y, radius, shape, colour) of each object, in [-1, 1] picture coordinates."""

    def jitter(amount: float) -> float:
        return float(rng.uniform(-amount, amount))

    if scene.kind == "one":
        places, radius = (POSITIONS[scene.where],), SIZES[scene.size]
        things = scene.things
    elif scene.kind == "twins":
        places, radius = ((-0.45, 0.0), (0.45, 0.0)), 0.30
        things = scene.things * 2
    else:
        places, radius = RELATIONS[scene.where], 0.32
        things = scene.things
    return [
        (x + jitter(0.05), y + jitter(0.05), radius * (1 + jitter(0.08)), shape, colour)
        for (x, y), (colour, shape) in zip(places, things, strict=True)
    ]


def _signed_distance(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, shape: str) -> torch.Tensor:
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(ax, ay) - r * 0.88
    if shape == "triangle":
        return torch.maximum(0.8660254 * ax - 0.5 * y - 0.5 * r, y - 0.6 * r)
    if shape == "diamond":
        return (ax + ay) * 0.7071068 - r * 0.78
    if shape == "cross":
        bar = torch.maximum(ax - r, ay - 0.34 * r)
        return torch.minimum(bar, torch.maximum(ax - 0.34 * r, ay - r))
    return (torch.hypot(x, y) - r * 0.78).abs() - r * 0.22


def render(
    scenes: Sequence[Scene], rng: np.random.Generator, size: int = IMAGE_SIZE
) -> torch.Tensor:
    """Draw scenes with jittered place, size and colour: float32 [n, 3, size, size] in [0, 1]."""

    def colour_of(name: str) -> np.ndarray:
        return np.clip(np.array(COLOURS[name]) / 255 + rng.uniform(-0.02, 0.02, 3), 0, 1)

    grounds, slots = [], [[], []]
    for index, scene in enumerate(scenes):
        grounds.append(colour_of(scene.background))
        for slot, thing in enumerate(_layout(scene, rng)):
            slots[slot].append((index, *thing[:4], colour_of(thing[4])))

    images = torch.tensor(np.array(grounds), dtype=torch.float32)[:, :, None, None]
    images = images.expand(-1, -1, size, size).clone()
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    for slot in slots:
        for shape in SHAPES:
            rows = [row for row in slot if row[4] == shape]
            if not rows:
                continue
            index = torch.tensor([row[0] for row in rows])
            x, y, r = (
                torch.tensor([row[k] for row in rows], dtype=torch.float32)[:, None, None]
                for k in (1, 2, 3)
            )
            colour = torch.tensor(np.array([row[5] for row in rows]), dtype=torch.float32)
            distance = _signed_distance(grid_x - x, grid_y - y, r, shape)
            cover = (0.5 - distance * size / 2).clamp(0, 1)[:, None]
            images[index] = images[index] * (1 - cover) + colour[:, :, None, None] * cover
    return images
