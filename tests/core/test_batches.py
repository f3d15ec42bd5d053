"""Batches: what fits goes together, and running out of memory halves it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.batches import Batches
from qsched_core.correction import ScalarCorrection
from qsched_core.prompts import PromptSet
from qsched_core.trajectory import Candidate, Trajectory


class FullError(RuntimeError):
    pass


def prompts(count):
    return PromptSet(tuple(f"thing {i}" for i in range(count)), tuple(range(count)))


def corrections(count):
    one = Trajectory.of((1.0, 0.0))
    return [Candidate(one, ScalarCorrection((1 + k / 64,), (1.0,))) for k in range(count)]


class Maker:
    """A picture's pixel is its prompt's seed and its candidate; fails above ``fits`` latents."""

    def __init__(self, fits):
        self.fits, self.sizes = fits, []

    def __call__(self, part, few):
        self.sizes.append(len(part) * len(few))
        if self.sizes[-1] > self.fits:
            raise FullError
        seeds = torch.tensor(part.seeds, dtype=torch.float32)
        return torch.stack([seeds + 100 * c.correction.c_x[0] for c in few])[..., None, None, None]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_every_picture_is_made_once_whatever_fits(count, candidates, most, fits):
    make, batches = Maker(fits), Batches(most, FullError)
    chosen = corrections(candidates)
    out = batches.images(make, prompts(count), chosen)
    assert out.shape == (candidates, count, 1, 1, 1)
    assert torch.equal(out, Maker(10**6)(prompts(count), chosen))
    assert batches.max_batch <= max(most, 1) and max(make.sizes) <= most
    good = [size for size in make.sizes if size <= fits]
    assert sum(good) >= count * candidates


def test_it_halves_until_it_fits_and_stays_there(caplog):
    relieved = []
    batches = Batches(16, FullError, lambda: relieved.append(1))
    make = Maker(5)
    batches.images(make, prompts(16), corrections(1))
    assert make.sizes == [16, 8, 4, 4, 4, 4] and batches.max_batch == 4 and len(relieved) == 2
    assert "batches of 4" in caplog.text


def test_what_does_not_fit_alone_is_raised():
    with pytest.raises(FullError):
        Batches(4, FullError).images(Maker(0), prompts(2), corrections(1))
    with pytest.raises(ValueError, match="max_batch=0"):
        Batches(0)
