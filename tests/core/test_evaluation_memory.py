"""An evaluation of any number of prompts: memory holds the pictures of one part."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest
import torch
from evaluation_cases import ONE, PaintSource, evaluated, three_arms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qsched_core.evaluation import Arm, FeatureSpace
from qsched_core.evaluation.frechet import frechet_distance, moments
from qsched_core.evaluation.study import keep_features, kept_features
from qsched_core.recent import Recent


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, nbytes: int) -> None:
        self.alive -= nbytes


class FlatSource(PaintSource):
    """Pictures of one colour each, quickly made."""

    def __init__(self, size: int):
        super().__init__()
        self.width = self.height = size

    def images(self, prompts, corrections, on_step=None):
        levels = torch.tensor(prompts.seeds).remainder(256) / 255
        shape = (len(corrections), len(prompts), self.height, self.width, 3)
        return levels[None, :, None, None, None].expand(shape).clone()


def measured(work) -> int:
    gc.collect()
    with PeakMemory() as memory:
        work()
    return memory.peak


def test_the_measure_sees_what_is_alive_at_once():
    def work():
        kept = [torch.ones(1000) for _ in range(3)]
        for _ in range(5):
            torch.ones(2000)
        del kept

    assert measured(work) == pytest.approx(4 * 5000, abs=100)


def test_pictures_of_one_part_are_in_memory(tmp_path):
    size, part, count = 128, 4, 60
    arms = [Arm("model", FlatSource(size), ONE, {})]
    whole = 4 * 3 * size * size * count
    peak = measured(lambda: evaluated(tmp_path, arms, count, part=part))
    assert peak < 6 * whole * part / count
    made = evaluated(tmp_path, arms, count, part=part)["model"]
    assert measured(made.images) < 1.5 * whole  # once, and a part


def test_memory_does_not_grow_with_the_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("qsched_core.evaluation.results.BLOCK", 20)
    dim, part = 150, 20
    wide = FeatureSpace("wide", lambda x: x.mean((1, 2)).repeat(1, dim // 3), {"name": "wide"})
    arms, references = [Arm("model", FlatSource(1), ONE, {})], torch.rand(2, 1, 1, 3)

    def peak(count):
        with PeakMemory() as memory:
            found = evaluated(
                tmp_path / str(count), arms, count, spaces=[wide], part=part, references=references
            )
        assert found.distances[0].images == count
        return memory.peak

    few, many = peak(180), peak(540)
    features = 360 * dim * 4
    assert many - few < features / 8


def test_files_of_any_number_of_bytes_leave_no_types_behind(tmp_path):
    """ctypes never frees the type of an array, and each number of elements is another type."""

    def kept() -> int:
        gc.collect()
        return len(ctypes.Array.__subclasses__())

    keep_features(tmp_path / "first.safetensors", torch.zeros(1, 3))
    before = kept()
    for count in range(1201, 1211):
        keep_features(tmp_path / f"{count}.safetensors", torch.zeros(1, count))
    assert kept() == before
    assert kept_features(tmp_path / "1210.safetensors").shape == (1, 1210)


def test_thirty_thousand_features_are_never_in_memory_at_once():
    count, dim, block = 30_000, 256, 1000
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.randn(block, dim, generator=generator) for _ in range(count // block))
    with PeakMemory() as memory:
        found = moments(blocks)
    assert found.count == count
    assert memory.peak < 20e6  # all of them are 31 MB, 61 MB in float64


@pytest.mark.parametrize("blocks", [[1000], [1, 999], [300, 300, 400], [999, 1], [100] * 10])
def test_moments_do_not_depend_on_the_blocks(blocks):
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0)) * 3 + 100
    found = moments(x.split(blocks))
    wide = x.double()
    assert found.count == 1000 and found.dim == 20
    torch.testing.assert_close(found.mean, wide.mean(0))
    torch.testing.assert_close(found.root.T @ found.root, torch.cov(wide.T))
    other = x[:700] + 0.1
    whole = frechet_distance(x, other)
    assert found.distance(moments([other])) == pytest.approx(whole, abs=1e-9)


def test_blocks_that_can_t_be_joined_are_named():
    x = torch.randn(4, 3)
    for blocks in ([], [x[:1]], [x, x / 0], [x[0]]):
        with pytest.raises(ValueError, match="pictures has"):
            moments(blocks, "pictures")


def test_arms_that_are_read_in_blocks_have_the_distances_of_whole_ones(tmp_path, monkeypatch):
    def distances():
        found = evaluated(tmp_path, three_arms(), 40, baseline="baseline")
        return [d.value for d in found.distances]

    whole = distances()
    monkeypatch.setattr("qsched_core.evaluation.results.BLOCK", 7)
    assert distances() == pytest.approx(whole, rel=1e-9) and min(whole) > 0


def test_what_was_used_last_is_kept():
    recent = Recent(10)
    for key in "abc":
        recent.put(key, key.upper(), 4)
        recent.get("a")
    assert [recent.get(key) for key in "abc"] == ["A", None, "C"]
    recent.put("large", "LARGE", 99)
    assert recent.get("large") == "LARGE" and recent.get("a") is None
