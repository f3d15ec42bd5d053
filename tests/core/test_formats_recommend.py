"""The format for a user who leaves it to us: the most precise that fits."""

from __future__ import annotations

import pytest
import torch

from qsched_core.formats import FormatError, get, names
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.formats.recommend import (
    LADDER,
    Weight,
    ordered,
    recommend,
    runnable,
    table,
)

WEIGHTS = {
    "img_in": Weight((256, 64), 2 * 256 * 64),  # kept: an embedder
    "blocks.0.mlp": Weight((1024, 512), 2 * 1024 * 512),
    "blocks.0.conv": Weight((128, 128, 3, 3), 2 * 9 * 128 * 128),  # int8_convrot leaves these
    "blocks.0.mlp.bias": Weight((1024,), 2 * 1024),
}


def taken(name: str, layers: str = "") -> int:
    """Bytes by really packing every layer."""
    total = 0
    for layer, weight in WEIGHTS.items():
        kind = {2: "linear", 4: "conv2d"}.get(len(weight.shape))
        form = kind and Policy(name, parse_overrides(layers))(layer, weight.shape, kind).format
        total += get(form).quantize(torch.randn(weight.shape)).nbytes if form else weight.nbytes
    return total


@pytest.mark.parametrize("name", runnable("cpu"))
def test_the_most_precise_that_fits_is_taken_and_its_size_is_what_packing_takes(name):
    need = taken(name)
    found = recommend(WEIGHTS, "", "cpu", need)
    assert found.nbytes == taken(found.format) <= need
    assert LADDER.index(found.format) <= LADDER.index(name)
    smaller = recommend(WEIGHTS, "", "cpu", need - 1)
    assert LADDER.index(smaller.format) > LADDER.index(found.format) or not smaller.fits


def test_where_none_fits_it_is_the_smallest_and_says_so():
    found = recommend(WEIGHTS, "", "cpu", 10)
    assert found.format == LADDER[-1]
    assert "more than is free" in found.describe()
    assert "more than is free" not in recommend(WEIGHTS, "", "cpu", 10**9).describe()


def test_overrides_count():
    plain = recommend(WEIGHTS, "", "cpu", 10**9)
    kept = recommend(WEIGHTS, "*mlp*=fp16", "cpu", 10**9)
    assert kept.nbytes == taken(kept.format, "*mlp*=fp16") > plain.nbytes
    with pytest.raises(FormatError, match="nf5"):
        recommend(WEIGHTS, "mlp=nf5", "cpu", 10**9)


def test_every_format_has_a_line_and_what_can_not_run_is_marked():
    lines = table("cpu").splitlines()
    assert [line.partition(":")[0] for line in lines] == list(ordered("cpu"))
    assert sorted(ordered("cpu")) == sorted(names())
    for line in lines:
        form = get(line.partition(":")[0])
        assert f"{form.bits:g} bits, {form.word}." in line
        assert ("NOT HERE: needs" in line) == (form.available("cpu") is not None)
