"""A walk that was stopped, killed or damaged goes on; what it leaves on the disk."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import rounding_task
import torch
from rounding_cases import INT2, PROMPTS, Brightness, same

from qsched_core.files import SPARE_BYTES, DiskError
from qsched_core.formats.policy import Policy
from qsched_core.rounding import RoundingSettings, TaskSubject, calibrate_weights, choices


class Stop(BaseException):
    pass


def stopped_at(index, task, folder, **more):
    """A walk that ends after its block ``index``."""

    def stop(done):
        if done.index == index:
            raise Stop

    with pytest.raises(Stop):
        calibrate_weights(TaskSubject(task), PROMPTS, INT2, folder, on_block=stop, **more)


def test_a_walk_that_was_stopped_goes_on_to_the_same_weights(tmp_path, task):
    whole = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "a")
    stopped_at(1, task, tmp_path / "b")
    told = []
    again = calibrate_weights(
        TaskSubject(task), PROMPTS, INT2, tmp_path / "b", on_block=told.append
    )
    assert [done.resumed for done in told] == [True, True, False]
    same(whole.weights.layers, again.weights.layers)


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, task):
    def never(x, sigma, cond):
        raise AssertionError("the model ran")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        calibrate_weights(
            TaskSubject(replace(task, denoise=never)), PROMPTS, INT2, tmp_path / "file" / "studies"
        )


def test_a_disk_without_room_for_the_blocks_is_refused_before_the_walk(tmp_path, task, monkeypatch):
    def called(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(task.module, "forward", called)
    layers = choices(task.module, INT2)
    weights = sum(task.module.get_submodule(name).weight.numel() for name in layers)
    room = type("Usage", (), {"free": SPARE_BYTES + weights // 4})  # 2 bits, but for the scales
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    with pytest.raises(DiskError, match=r"walk can't be written, .* MB free"):
        calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "walk")


def test_a_finished_walk_is_not_repeated(tmp_path, task, monkeypatch, caplog):
    measure = Brightness()
    first = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path, samples=True)
    assert not list(tmp_path.rglob("blocks"))

    def again(**more):
        told = []
        found = calibrate_weights(
            TaskSubject(task), PROMPTS, INT2, tmp_path, on_block=told.append, **more
        )
        assert found.weights.digest == first.weights.digest
        return found, told

    # Another proof of the same weights
    found, told = again(measure=measure)
    assert not told and found.proof.gain is not None and not found.samples
    monkeypatch.setattr(task.module, "forward", None)  # nothing runs
    found, told = again(samples=True)
    assert found.proof == first.proof and found.weights.provenance == first.weights.provenance
    assert len(found.samples) == 3
    for one, other in zip(found.samples, first.samples, strict=True):
        assert one.prompt == other.prompt and torch.equal(one.pictures, other.pictures)
    monkeypatch.undo()
    for path in tmp_path.rglob("proof-*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    found, told = again(samples=True)
    assert not told and found.proof == first.proof and "the proof is made again" in caplog.text
    path = next(tmp_path.rglob("weights.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    found, told = again(samples=True)
    assert len(told) == 3 and "the weights are rounded again" in caplog.text


def test_old_walks_go_when_another_begins(tmp_path, task):
    def walk(name, days):
        folder = tmp_path / name
        (folder / "blocks").mkdir(parents=True)
        then = time.time() - 24 * 3600 * days
        for path in (folder / "weights.safetensors", folder / "blocks" / "a"):
            path.write_text("")
            os.utime(path, (then, then))
        for path in (folder / "blocks", folder):
            os.utime(path, (then, then))

    for days in range(5):
        walk(f"rounding-{days}", days + 0.5)
    walk("studies", 9)
    stopped_at(0, task, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir() if len(path.name) < 12)
    assert left == ["rounding-0", "rounding-1", "rounding-2", "studies"]


@pytest.mark.parametrize("wound", ["flip", "cut", "empty"])
def test_a_damaged_block_is_named_and_made_again(tmp_path, task, caplog, wound):
    whole = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path / "whole")
    stopped_at(2, task, tmp_path)
    path = next(tmp_path.rglob("blocks.1.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[wound])
    told = []
    again = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path, on_block=told.append)
    assert [done.resumed for done in told] == [True, False, True]
    assert "blocks.1 is rounded again" in caplog.text
    same(whole.weights.layers, again.weights.layers)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": RoundingSettings(rounds=1)},
        {"states_per_prompt": 1},
        {"seed": 1, "states_per_prompt": 1},
        {"policy": Policy("int3")},
        {"task": "other weights"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_walk_of_anything_else_is_not_gone_on_with(tmp_path, task, change):
    more = {"policy": INT2} | change
    if "task" in more:
        other = rounding_task.net()
        other.blocks[2].proj.bias.data += 1e-3
        more["task"] = rounding_task.task(other)
    told = []
    base = {"states_per_prompt": 1} if "seed" in change else {}
    stopped_at(2, task, tmp_path, **base)
    subject = TaskSubject(more.pop("task", task))
    calibrate_weights(subject, PROMPTS, more.pop("policy"), tmp_path, on_block=told.append, **more)
    assert not any(done.resumed for done in told)
