"""The file of states: nothing lost, nothing left behind, full disks."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding_cases import INT2

from qsched_core import workspace
from qsched_core.files import DiskError
from qsched_core.rounding import Limits, calibrate_module, passes
from qsched_core.rounding.blocks import blocks_of
from qsched_core.rounding.plan import stored_bytes
from qsched_core.rounding.streams import Streams


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_stored_comes_back_as_a_copy_whatever_its_type_and_shape(tmp_path):
    tree = {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "turned": torch.randn(4, 6).t(),
        "one": (torch.tensor(7), torch.tensor([True, False])),
        "none": torch.empty(0, 3),
        "named": 4,
    }
    with Streams(tmp_path, 0) as streams:
        streams.put("a", tree)
        streams.put("b", tree["turned"] + 1)
        found = streams.get("a", "cpu")
        found["bf16"].zero_()
        found = streams.get("a", "cpu")
        assert found["named"] == 4 and found["none"].shape == (0, 3)
        for one, other in zip(
            (found["bf16"], found["turned"], *found["one"]),
            (tree["bf16"], tree["turned"], *tree["one"]),
            strict=True,
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)
        assert torch.equal(streams.get("b", "cpu"), tree["turned"] + 1)
        streams.hollow("a")
        found = streams.get("a", "cpu")
        assert found["bf16"].shape == (3, 5) and not found["bf16"].any()
    assert not files_in(tmp_path)


def test_what_is_let_go_is_freed_on_the_disk(tmp_path):
    one = torch.zeros(1000)
    with Streams(tmp_path, 0) as streams:
        for k in range(4):
            streams.put(k, one)
        full = streams.nbytes
        for k in (1, 2):
            streams.drop(k)
        streams.put("wide", torch.ones(2000))  # in the place of both
        assert streams.nbytes == full
        assert torch.equal(streams.get("wide", "cpu"), torch.ones(2000))
        assert torch.equal(streams.get(3, "cpu"), one)
        streams.drop("wide")
        streams.hollow(3)
        assert streams.nbytes < full / 3
        (path,) = [p for p in files_in(tmp_path) if p.name == "data"]
        assert path.stat().st_size == streams.nbytes
        streams.clear()
        assert path.stat().st_size == 0


def test_a_walk_keeps_no_more_on_the_disk_than_it_says(tmp_path, task, states, monkeypatch):
    blocks = blocks_of(task.module, lambda: states.run(slice(0, 1)))
    most = []
    real = Streams.put

    def put(self, key, tree):
        real(self, key, tree)
        most.append(self.nbytes)

    monkeypatch.setattr(Streams, "put", put)
    calibrate_module(task.module, states, INT2, limits=Limits(scratch=tmp_path))
    said = stored_bytes(blocks, len(states), 2)
    assert 0.4 * said < max(most) <= said
    assert not files_in(tmp_path)


def test_a_full_disk_is_one_error_before_the_walk_and_on_the_way(
    tmp_path, task, states, monkeypatch
):
    limits = Limits(scratch=tmp_path / "walk")
    room = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: room)
        with pytest.raises(DiskError, match=r"walk.* it takes .* MB .* MB free") as error:
            calibrate_module(task.module, states, INT2, limits=limits)
        assert error.value.errno == errno.ENOSPC

    def full(self, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Streams, "_write", full)
    with pytest.raises(DiskError, match=r"the disk is full: it takes .* MB, .*walk has .* free"):
        calibrate_module(task.module, states, INT2, limits=limits)
    assert not files_in(tmp_path)


def test_the_file_goes_after_errors_and_after_a_kill(tmp_path, task, states):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_module(task.module, states, INT2, limits=Limits(scratch=tmp_path, check=stop))
    assert not files_in(tmp_path)
    code = (
        "import os, sys, torch; from pathlib import Path; "
        "from qsched_core.rounding.streams import Streams\n"
        "with Streams(Path(sys.argv[1]), 0) as s: s.put(1, torch.ones(1000)); os._exit(9)"
    )
    root = Path(workspace.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == 9
    assert files_in(tmp_path)
    with Streams(tmp_path, 0):
        assert len({path.parent for path in files_in(tmp_path)}) == 1


def test_the_default_place_of_the_file_is_the_systems(task, states, monkeypatch, tmp_path):
    monkeypatch.setattr(passes.tempfile, "gettempdir", lambda: str(tmp_path))
    seen = []
    limits = Limits(check=lambda: seen.extend(files_in(tmp_path)))
    calibrate_module(task.module, states, INT2, limits=limits)
    assert seen and not files_in(tmp_path)
