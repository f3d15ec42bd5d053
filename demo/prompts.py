"""The demo's prompts: captions of scenes that no training picture showed, in disjoint sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shapes import sample_scenes

SIZES = {"calibration": 20, "heldout": 128, "test": 128, "weights": 128}
DRAWN = 720  # scenes drawn, before repeats go


@dataclass(frozen=True)
class DemoPrompts:
    """``calibration`` is searched on, ``heldout`` decides the guard, ``test`` is only measured.

    ``weights`` are what weights are rounded for.
    """

    calibration: tuple[str, ...]
    heldout: tuple[str, ...]
    test: tuple[str, ...]
    weights: tuple[str, ...]


def demo_prompts(seed: int = 7) -> DemoPrompts:
    rng = np.random.default_rng(seed)
    captions = dict.fromkeys(scene.caption() for scene in sample_scenes(DRAWN, rng, held_out=True))
    names = iter(captions)
    return DemoPrompts(**{key: tuple(next(names) for _ in range(n)) for key, n in SIZES.items()})
