"""The attacks of ``bench reliability`` in small, and that they notice what they are made to find."""

from __future__ import annotations

import json
import mmap
import random
import re
from pathlib import Path

import pytest
import torch

from benchmarks import reliability
from benchmarks._reliability import (
    allocated,
    cases,
    disk,
    kills,
    kinds,
    mutants,
    mutate,
    soak,
    workflows,
)
from benchmarks._reliability.cases import Failure, Setting

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"tell": lambda line: None}
SLOW = dict.fromkeys((*mutants.kept.KINDS, *mutants.hosted.KINDS), pytest.mark.full)


@pytest.mark.parametrize("name", kinds.KINDS)
def test_no_damaged_text_is_taken_for_another_or_raises_anything_else(name, tmp_path):
    kind, read = kinds.KINDS[name](tmp_path), 0
    for index in range(200):
        data, sample = mutants.mutant_of(kind, 20261127, index)
        problem, found = mutants.problem_of(kind, data, sample)
        assert not problem, (index, problem, data[:300])
        read += found
    assert 0 < read < 200


@pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in SLOW.items()])
def test_no_damaged_file_is_either(name, tmp_path):
    size = round(60 / mutants.SHARES[name])
    found = mutants.run(Setting(size, 20261127, tmp_path, **QUIET), (name,))
    assert found.cases == 60
    assert [failure.problem for failure in found.failures] == []


def test_shares_are_of_every_kind_and_make_a_whole():
    assert mutants.SHARES.keys() == mutants.KINDS.keys()
    assert sum(mutants.SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("x"), "undocumented KeyError at test_reliability.py"),
        (kinds.DifferentError("y"), "silent other value: y"),
    ],
)
def test_what_a_reader_should_not_do_is_a_problem(error, says):
    def read(data, sample):
        raise error

    kind = kinds.Kind("k", [b"abc"], mutate.of_bytes, read)
    data, sample = mutants.mutant_of(kind, 1, 2)
    assert mutants.mutant_of(kind, 1, 2) == (data, sample)
    assert mutants.problem_of(kind, data, sample)[0].startswith(says)


def test_a_worker_that_dies_is_gone_past_and_its_mutant_kept(tmp_path, monkeypatch):
    told = iter([([], "the process died (-11): "), ([{"read": 3}], "")])
    monkeypatch.setattr(mutants, "_worker", lambda *_: next(told))
    count, read, (failure,) = mutants._of_kind("layers", 1, 10, tmp_path)
    assert (count, read, failure.case["index"]) == (10, 3, 0) and "-11" in failure.problem


def test_a_worker_that_goes_no_further_is_ended_and_its_mutant_named(tmp_path, monkeypatch):
    """By its CPU's clock: on a busy machine a slow start is no hang."""
    busy = "import sys; sys.stdout.flush()\nwhile True: pass"
    popen = mutants.subprocess.Popen
    monkeypatch.setattr(
        mutants.subprocess,
        "Popen",
        lambda command, **more: popen([command[0], "-c", busy], **more),
    )
    monkeypatch.setattr(mutants, "STUCK_CPU_SECONDS", 0.5)
    (tmp_path / "slot").write_bytes(bytes(mutants.SLOT.size))
    lines, ending = mutants._worker("layers", 1, 0, 10, tmp_path)
    assert lines == [] and ending.startswith("no end within")


@pytest.mark.parametrize("edit", [mutate.of_bytes, mutate.of_json, mutate.any_byte])
def test_mutants_follow_from_their_seed(edit):
    sample = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    made = [edit(sample, random.Random(i)) for i in range(50)]
    assert made == [edit(sample, random.Random(i)) for i in range(50)]
    assert sum(one != sample for one in made) > 40


def test_a_failure_is_a_file_to_rerun(tmp_path, capsys):
    case = {"kind": "entry", "seed": 1, "index": 0, "sample": 0}
    failure = Failure("mutants", case, "undocumented KeyError", b'{"error": 1' + b"0" * 400 + b"}")
    (path,) = cases.keep([failure], tmp_path)
    assert Failure.load(path) == failure
    assert reliability.rerun(path) == 0 and "no failure" in capsys.readouterr().out
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no failure of bench reliability"):
        Failure.load(path)


def test_every_node_is_in_some_workflow_that_is_damaged():
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    named = {name for text in texts for name in re.findall(r'node_id="(\w+)"', text)}
    prompts = (json.loads(sample) for sample in workflows.samples())
    assert len(named) > 20
    assert named <= {node["class_type"] for prompt in prompts for node in prompt.values()}


def test_workflows_that_end_comfyuis_own_worker_are_left_out():
    found = workflows.samples()
    assert not any(workflows.kills_the_host(sample) for sample in found)
    assert workflows.kills_the_host(b'{"1": {"class_type": "QSchedShowSchedule"}}')
    made = [workflows.mutant_of(found, 1, index)[len(b'{"prompt": ') : -1] for index in range(300)]
    assert len(set(made)) > 250 and not any(map(workflows.kills_the_host, made))


def test_sizes_shrink_with_the_minutes():
    for name, whole in reliability.SIZES.items():
        assert reliability.size_of(name, reliability.MINUTES) == whole
        assert reliability.LEAST[name] <= reliability.size_of(name, 1) <= whole


def test_the_slope_of_memory():
    flat = [900.0 + i % 7 / 10 for i in range(60)]
    assert soak.slope([400.0] * 4 + flat) == pytest.approx(0, abs=0.3)
    assert soak.slope([value + i / 5 for i, value in enumerate(flat)]) == pytest.approx(2, abs=0.3)


def test_what_is_allocated_counts_while_it_is_held():
    before = allocated.allocated()
    if before is None:
        pytest.skip("malloc can't be asked here: mallinfo2 is of glibc 2.33")
    held = torch.zeros(5_000_000)
    assert allocated.allocated()["used"] - before["used"] == pytest.approx(20, abs=2)
    del held
    assert allocated.allocated()["used"] == pytest.approx(before["used"], abs=2)


def test_memory_is_told_without_the_files_that_are_mapped(tmp_path):
    here = soak.psutil.Process()
    own, mapped = soak.held(here)
    assert own > 20 and own + mapped == pytest.approx(here.memory_info().rss / 1e6, rel=0.05)
    before = soak.maps(here)  # other tests may have opened some
    (tmp_path / "a.safetensors").write_bytes(bytes(5000))
    with open(tmp_path / "a.safetensors", "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert soak.maps(here) == before + 1
    held.close()
    assert soak.maps(here) == before


def test_a_full_disk(tmp_path):
    if disk.why_not():
        pytest.skip(disk.why_not())
    found = disk.run(Setting(10, 7, tmp_path, **QUIET))
    assert [failure.problem for failure in found.failures] == []


@pytest.mark.full
@pytest.mark.parametrize("name", ["calibrate_weights", "evaluate"])
def test_killed_work_goes_on_to_the_same_result(name, tmp_path, monkeypatch):
    (job,) = (job for job in kills.JOBS if job.name == name)
    monkeypatch.setattr(kills, "JOBS", (job,))
    found = kills.run(Setting(2, 7, tmp_path, **QUIET))
    assert found.cases == 2 and [failure.problem for failure in found.failures] == []
