"""The evaluation: paired arms, kept part by part, the same whatever happened in between."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from evaluation_cases import (
    ONE,
    OTHER,
    Brightness,
    PaintSource,
    StopError,
    candidate,
    evaluated,
    prompt_set,
    space,
    three_arms,
)

from qsched_core.evaluation import Arm, EvaluationError, results, run
from qsched_core.statistics import paired_interval
from qsched_core.workspace import Workspace

LINUX = sys.platform == "linux"


def content(evaluation):
    found = evaluation.to_dict()
    for arm in found["arms"].values():
        del arm["seconds"], arm["new_images"], arm["nfe"]
    del found["new_images"]
    return found


def test_every_arm_has_the_same_prompts_and_is_scored_as_its_pictures_are(tmp_path):
    made = evaluated(tmp_path)
    assert [arm.name for arm in made.arms] == ["baseline", "quantized", "schedule"]
    for arm in made.arms:
        images = arm.images()
        assert images.shape == (10, 8, 12, 3)
        scored = Brightness().score(images, made.prompts.prompts)
        assert arm.scores == scored
        (features,) = arm.features("pixels")
        assert torch.equal(features, space().encode(images))
    low, high = (made[name].images() for name in ("quantized", "schedule"))
    torch.testing.assert_close(high - low, torch.full_like(low, 0.1), atol=1 / 254, rtol=0)
    assert torch.equal(made["schedule"].picture(9), (high[9] * 255).round().to(torch.uint8))


def test_pictures_come_back_to_the_nearest_of_256_levels_from_any_run(tmp_path):
    arms = three_arms()
    first = evaluated(tmp_path, arms)["schedule"].images()
    made = arms[2].source.images(prompt_set(10), [OTHER])[0]
    assert torch.equal(first, (made * 255).round() / 255)
    assert torch.equal(evaluated(tmp_path)["schedule"].images(), first)


def test_large_pictures_are_mapped_from_a_file_that_goes(tmp_path, monkeypatch):
    made, scratch = evaluated(tmp_path / "kept")["schedule"], tmp_path / "scratch"
    scratch.mkdir()
    in_memory = made.images(scratch)
    monkeypatch.setattr(results, "MAPPED", 1)
    before = set(Path("/proc/self/maps").read_text().split("\n")) if LINUX else set()
    mapped = made.images(scratch)
    assert torch.equal(mapped, in_memory)
    if LINUX:
        new = set(Path("/proc/self/maps").read_text().split("\n")) - before
        assert any(str(scratch) in line for line in new)
        assert list(scratch.iterdir()) == []
    mapped[0] = 0  # a node that writes into it changes its own copy
    assert torch.equal(made.images(), in_memory)


def test_pictures_that_a_full_disk_can_t_hold_are_kept_in_memory(tmp_path, monkeypatch, caplog):
    made, scratch = evaluated(tmp_path / "kept")["schedule"], tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(results, "MAPPED", 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "from_file", full)
    assert torch.equal(made.images(scratch), made.images())
    assert "disk is full" in caplog.text and list(scratch.iterdir()) == []


def test_gains_are_paired_intervals_of_every_score(tmp_path):
    made = evaluated(tmp_path)
    pairs = [(c.before, c.after) for c in made.comparisons]
    assert pairs == [
        ("baseline", "quantized"), ("baseline", "schedule"), ("quantized", "schedule"),
    ]  # fmt: skip
    gains = made.comparison("quantized", "schedule").gains
    assert list(gains) == ["jaq", "alignment", "quality", "mean"]
    before, after = (made[name].scores.quality for name in ("quantized", "schedule"))
    assert gains["quality"] == paired_interval(before, after)
    assert made.comparison("baseline", "quantized").gains["jaq"].high < 0


def test_arms_of_one_model_share_its_batches(tmp_path):
    arms = three_arms()
    made = evaluated(tmp_path, arms)
    assert arms[1].source.calls == [(2, 4), (2, 4), (2, 2)]
    spent = sum(arm.source.nfe for arm in arms[:2])
    assert sum(arm.nfe for arm in made.arms) == spent == 10 * 3 + 10 * 5


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stopped_run_continues_to_the_same_result(tmp_path, stop_after):
    whole = evaluated(tmp_path / "whole", baseline="baseline")
    broken = three_arms(model=PaintSource(0.1, stop_after))
    with pytest.raises(StopError):
        evaluated(tmp_path / "broken", broken, baseline="baseline")
    arms = three_arms()
    resumed = evaluated(tmp_path / "broken", arms, baseline="baseline")
    assert content(resumed) == content(whole)
    assert torch.equal(resumed["schedule"].images(), whole["schedule"].images())
    assert not arms[0].source.calls  # it was finished
    assert len(arms[1].source.calls) == 3 - stop_after
    assert resumed.new_images == 2 * (10 - min(10, 4 * stop_after))


def test_a_finished_evaluation_makes_nothing(tmp_path):
    evaluated(tmp_path)
    arms, seen = three_arms(), []
    again = evaluated(tmp_path, arms, on_progress=seen.append)
    assert again.new_images == 0
    assert not arms[0].source.calls and not arms[1].source.calls
    assert [p.done for p in seen][-1] == 30 and all(p.resumed for p in seen)


def test_another_schedule_repeats_only_itself(tmp_path):
    evaluated(tmp_path)
    arms = three_arms()
    arms[2] = Arm("schedule", arms[2].source, candidate(0.9))
    made = evaluated(tmp_path, arms)
    assert made.new_images == 10 and not arms[0].source.calls
    assert {candidates for candidates, _ in arms[1].source.calls} == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"objective": Brightness(1.0)},
        {"spaces": [space("others")]},
        {"count": 11},
        {"part": 5},
        {"arms": [Arm("baseline", PaintSource(0.2, model="another"), ONE)]},
        {"arms": [Arm("baseline", PaintSource(0.2, model="full"), OTHER)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_numbers_depend_on_is_evaluated_anew(tmp_path, change):
    evaluated(tmp_path)
    arms = [Arm("baseline", PaintSource(0.2, model="full"), ONE)]
    assert evaluated(tmp_path, arms).new_images == 0
    made = evaluated(tmp_path, **({"arms": arms} | change))
    assert made.new_images == len(made.prompts)


def test_other_code_evaluates_anew(tmp_path, monkeypatch):
    evaluated(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "one.py").write_text("a = 1")
    first = run.source_hash(tmp_path / "code")
    run.source_hash.cache_clear()
    (tmp_path / "code" / "one.py").write_text("a = 2")
    assert run.source_hash(tmp_path / "code") != first
    monkeypatch.setattr(run, "CORE", tmp_path / "code")
    assert evaluated(tmp_path).new_images == 30


def parts(folder):
    return sorted(folder.glob("*/part-*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other"])
def test_a_damaged_part_is_made_again(tmp_path, damage, caplog):
    whole = evaluated(tmp_path)
    found = parts(tmp_path)
    assert len(found) == 9
    if damage == "other":  # the last part, with fewer pictures
        found[1].write_bytes(found[2].read_bytes())
    else:
        data = found[1].read_bytes()
        found[1].write_bytes({"cut": data[:-9], "empty": b"", "garbage": b"x" * 99}[damage])
    again = evaluated(tmp_path)
    assert again.new_images == 4 and "made again" in caplog.text
    assert content(again) == content(whole)


def test_abandoned_files_go_and_a_running_one_stays(tmp_path):
    evaluated(tmp_path)
    folder = parts(tmp_path)[0].parent
    old = folder / "part-000000.safetensors.0123abcd.partial"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    with Workspace(folder, "part-000000.safetensors") as running:
        evaluated(tmp_path)
        assert running.path.exists() and not old.exists()


def test_two_at_once_don_t_disturb_each_other(tmp_path):
    """The second runs within the first, between two of its parts."""
    inner = []

    def second(progress):
        if not inner:
            inner.append(None)
            inner[0] = evaluated(tmp_path)

    outer = evaluated(tmp_path, on_progress=second)
    assert content(outer) == content(inner[0])
    assert evaluated(tmp_path).new_images == 0


def test_a_folder_that_can_t_hold_it_is_an_error_before_any_picture(tmp_path, monkeypatch):
    arms = three_arms()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EvaluationError, match="can't be written"):
        evaluated(blocked / "inner", arms)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("U", (), {"free": 2**20}))
    with pytest.raises(
        EvaluationError,
        match=r"can't be written, the disk is too full: it takes .* has 1\.0 MB free",
    ):
        evaluated(tmp_path, arms)
    assert not arms[0].source.calls and not arms[1].source.calls


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch):
    from qsched_core.evaluation import study

    kept, write = [], study.write_atomic

    def fills_up(path, data):
        if len(kept) == 2 and "part" in path.name:
            raise OSError(28, "No space left on device")
        kept.extend([path] if "part" in path.name else [])
        return write(path, data)

    monkeypatch.setattr(study, "write_atomic", fills_up)
    with pytest.raises(EvaluationError, match=r"No space left.*finished parts are kept"):
        evaluated(tmp_path)
    monkeypatch.undo()
    assert evaluated(tmp_path).new_images == 30 - 8


def test_distances_are_from_the_baseline_and_from_given_images(tmp_path):
    references = torch.rand(5, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    made = evaluated(tmp_path, baseline="baseline", references=references)
    found = [(d.arm, d.against, d.images, d.against_images) for d in made.distances]
    assert found == [
        ("quantized", "baseline", 10, 10),
        ("schedule", "baseline", 10, 10),
        ("baseline", "reference images", 10, 5),
        ("quantized", "reference images", 10, 5),
        ("schedule", "reference images", 10, 5),
    ]
    # brighter by 0.1 in every one of its 18 numbers, the same otherwise
    assert made.distances[0].value == pytest.approx(18 * 0.1**2, abs=0.02)
    assert made.distances[1].value == pytest.approx(0, abs=0.02)
    assert any("5 images are few for features of 18 dimensions" in note for note in made.notes)


def test_reference_images_are_encoded_once(tmp_path):
    calls = []

    def encode(images):
        calls.append(len(images))
        return space().encode(images)

    counted = type(space())("pixels", encode, {"name": "pixels"})
    references = torch.rand(20, 8, 12, 3)
    one = evaluated(tmp_path, references=references, spaces=[counted])
    assert sum(calls) == 30 + 20
    two = evaluated(tmp_path, references=references, spaces=[counted])
    assert sum(calls) == 50 and content(one) == content(two)
    evaluated(tmp_path, references=references[:19], spaces=[counted])
    assert sum(calls) == 69


def test_one_prompt_is_said_to_tell_nothing(tmp_path):
    made = evaluated(tmp_path, count=1, baseline="baseline")
    assert not made.distances and not made.comparisons[0].gains
    assert "one prompt gives no interval" in made.notes[0]


def test_progress_counts_prompts_and_steps(tmp_path):
    seen, steps = [], []
    evaluated(
        tmp_path,
        on_progress=seen.append,
        on_step=lambda arm, images: steps.append((arm.name, images)),
    )
    assert [p.done for p in seen] == [4, 8, 10, 14, 18, 22, 26, 28, 30]
    assert {p.total for p in seen} == {30} and not any(p.resumed for p in seen)
    assert steps.count(("quantized", 8)) == 6 and steps.count(("baseline", 2)) == 3


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"arms": []}, "at least one"),
        ({"arms": three_arms()[:1] * 2}, "a name of its own"),
        ({"baseline": "nothing"}, "baseline='nothing'"),
        ({"part": 0}, "part=0"),
        ({"references": torch.rand(3, 8, 12)}, "reference images have shape"),
        ({"references": torch.rand(1, 8, 12, 3)}, "at least 2"),
    ],
)
def test_bad_input_is_named_before_any_picture(tmp_path, change, reason):
    arms = three_arms()
    with pytest.raises(EvaluationError, match=reason):
        evaluated(tmp_path, **({"arms": arms} | change))
    assert not arms[0].source.calls and not list(tmp_path.iterdir())


def test_pictures_with_nan_are_an_error_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match="must be a finite number"):
        evaluated(tmp_path, three_arms(PaintSource(float("nan"))))
    assert not parts(tmp_path)
