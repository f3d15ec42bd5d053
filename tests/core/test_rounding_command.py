"""The command that calibrates weights, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from rounding_cases import FILE, PROMPTS, arguments, same

from qsched_core.cli import calibrate_weights as command
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.rounding import RoundedWeights, choices, quantized, rounded_plainly
from qsched_core.rounding.proof import final_latents
from qsched_core.rounding.walk import parameters_in
from qsched_core.task import TaskSource


def test_the_command_writes_weights_and_says_what_they_are_worth(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert command.main([*arguments(tmp_path), "--json", str(figures)]) == 0
    told = capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["calibrated"] and content["proof"]["change"]["high"] < 0
    assert f"calibrated {content['proof']['distance']['calibrated']:.5f}" in told
    weights = RoundedWeights.load(tmp_path / "weights.safetensors")
    assert weights.provenance["proof"] == content["proof"]
    for wrong, reason in (
        (["--format", "fp8_e4m3"], "can't be calibrated"),
        (["--damp", "0"], "damp=0.0 must be"),
        (["--task", f"{FILE}:without_module"], "the task has no module"),
    ):
        assert command.main([*arguments(tmp_path, "none"), *wrong]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.full
def test_a_command_that_is_killed_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert command.main(arguments(whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "qsched_core.calibrate_weights", *arguments(killed)],
        cwd=FILE.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(killed.rglob("blocks.0.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert command.main(arguments(killed)) == 0
    one, other = (RoundedWeights.load(f / "weights.safetensors") for f in (whole, killed))
    same(one.layers, other.layers)


def test_the_demo_task_loads_calibrated_weights(tmp_path, monkeypatch):
    from demo import task as demo

    full = demo.full(torch.device("cpu"))
    policy = Policy("int2", parse_overrides("*=keep; *mlp.fc1=int2"))
    chosen = choices(full.module, policy)
    weights = RoundedWeights(
        rounded_plainly(chosen, partial(parameters_in, full.module)), chosen, {"format": "int2"}
    )
    monkeypatch.setenv(demo.WEIGHTS, str(weights.save(tmp_path / "weights.safetensors")))
    task = demo.calibrated(torch.device("cpu"))
    assert task.provenance["rounding"] == weights.digest
    assert task.provenance["source_hash"] == full.provenance["source_hash"]
    prompts = PROMPTS.heldout.part(0, 2)
    with quantized(full.module, weights.layers, chosen):
        expected = final_latents(TaskSource(full, 0), prompts)
    assert torch.equal(final_latents(TaskSource(task, 0), prompts), expected)
