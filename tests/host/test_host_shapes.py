"""The table of layer shapes that benchmarks use without ComfyUI."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks._families import FAMILIES, weights
from benchmarks._shapes import LAYERS
from qsched_core.formats.policy import Policy


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shapes_are_those_of_comfyuis_own_modules(name):
    policy = Policy("int2")
    found = Counter(
        w.shape
        for w in weights(FAMILIES[name].module())
        if w.kind and policy(w.layer, w.shape, w.kind).format is not None
    )
    assert LAYERS[name] == found
