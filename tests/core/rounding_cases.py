"""What the tests of calibrated rounding share: prompts, states, a measure, a command's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import rounding_task
import torch

from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.objective import Scores
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import TaskSubject

FILE = Path(rounding_task.__file__)
INT2 = Policy("int2", parse_overrides("first=int2"))
PROMPTS = CalibrationPrompts.of(
    [f"thing {i}" for i in range(20)], [f"other {i}" for i in range(24)]
)


def states_of(task, per_prompt=0, seed=0):
    return TaskSubject(task).states(PROMPTS.calibration, per_prompt, seed)


def same(one, other):
    assert list(one) == list(other)
    for name, layer in one.items():
        found = other[name]
        assert torch.equal(layer.packed.codes, found.packed.codes), name
        for table, data in layer.packed.aux.items():
            assert torch.equal(data.float(), found.packed.aux[table].float()), (name, table)
        assert (layer.bias is None) == (found.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, found.bias), name


class Brightness:
    """Scores a picture by its mean."""

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        means = tuple(images.mean((1, 2, 3)).tolist())
        return Scores(means, means, means)

    def describe(self):
        return {}


def arguments(folder, name="weights"):
    lists = {
        "calibration": list(PROMPTS.calibration.prompts),
        "heldout": list(PROMPTS.heldout.prompts),
    }
    (folder / "prompts.json").write_text(json.dumps(lists))
    return [
        "--task", f"{FILE}:full", "--prompts", str(folder / "prompts.json"), "--format", "int2",
        "--folder", str(folder / "studies"), "--out", str(folder / f"{name}.safetensors"),
    ]  # fmt: skip
