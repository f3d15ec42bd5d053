"""Files of calibrated weights: what comes back, and what is refused."""

from __future__ import annotations

import json

import pytest
import rounding_task
import torch
from rounding_cases import INT2, PROMPTS, same
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qsched_core.formats import get
from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Choice
from qsched_core.rounding import (
    RoundedWeights,
    RoundingError,
    TaskSubject,
    calibrate_weights,
    quantized,
)
from qsched_core.rounding.layer import Calibrated
from qsched_core.rounding.proof import final_latents
from qsched_core.study.seal import digest
from qsched_core.task import TaskSource


def test_the_file_gives_back_what_was_saved(tmp_path, task):
    result = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path)
    path = result.weights.save(tmp_path / "weights.safetensors")
    again = RoundedWeights.load(path)
    same(result.weights.layers, again.layers)
    assert again.provenance == json.loads(json.dumps(result.weights.provenance))
    assert again.digest == result.weights.digest
    model = again.apply(rounding_task.net())
    with quantized(task.module, result.weights.layers, result.weights.chosen):
        expected = final_latents(TaskSource(task, 0), PROMPTS.heldout)
    assert torch.equal(
        final_latents(TaskSource(rounding_task.task(model), 0), PROMPTS.heldout), expected
    )
    with pytest.raises(RoundingError, match="quantized already"):
        calibrate_weights(TaskSubject(rounding_task.task(model)), PROMPTS, INT2, tmp_path)


def test_a_file_for_another_model_is_refused(tmp_path, task):
    result = calibrate_weights(TaskSubject(task), PROMPTS, INT2, tmp_path)
    other = rounding_task.net()
    other.blocks[1].q = nn.Linear(32, 64)
    with pytest.raises(FormatError, match=r"blocks\.1\.q has shape \(64, 32\)"):
        result.weights.apply(other)
    del other.blocks[2]
    other.blocks[1].q = nn.Linear(64, 64)
    with pytest.raises(FormatError, match=r"no layer blocks\.2\.q"):
        result.weights.apply(other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(next(tmp_path.rglob("weights.safetensors")).read_bytes()[:-7])
    with pytest.raises(FormatError, match="cut short"):
        RoundedWeights.load(broken)


def hostile(path, change):
    """The file with its description changed, and the checksum that goes with that."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["qsched_rounding"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = change(content, tensors)
    del content["sum"]
    text = json.dumps({**content, "sum": digest(content)}) if text is None else text
    save_file(tensors, path, {"qsched_rounding": text})


def _shorter(content, tensors):
    tensors["first.scale"] = tensors["first.scale"][:1].clone()


HOSTILE = {
    "layers are a list": lambda c, t: c.update(layers=[1]),
    "a layer is a number": lambda c, t: c["layers"].update(first=1),
    "errors are a text": lambda c, t: c["layers"]["first"].update(errors="ab"),
    "a shape of texts": lambda c, t: c["layers"]["first"].update(shape=["a", "b"]),
    "a shape beyond all": lambda c, t: c["layers"]["first"].update(shape=[2**62, 2**62]),
    "too deep": lambda c, t: "[" * 200_000,
    "a table too short": _shorter,
    "a name that turns": lambda c, t: c["layers"].update({"a\u202eb": {}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error_that_names_it(tmp_path, case):
    form = get("int2")
    packed = form.quantize(torch.randn(8, 64))
    weights = RoundedWeights(
        {"first": Calibrated(packed, None, 0.2, 0.1, "")}, {"first": Choice("int2", True)}
    )
    path = weights.save(tmp_path / "evil.safetensors")
    hostile(path, HOSTILE[case])
    with pytest.raises(
        FormatError, match=r"^evil\.safetensors.*again$|^evil\.safetensors has no"
    ) as error:
        RoundedWeights.load(path)
    assert str(error.value).isprintable() and "checksum" not in str(error.value)


@pytest.mark.parametrize(
    "place", ["provenance", "layers/first/errors", "layers/first/note", "version"]
)
def test_what_a_file_says_of_itself_is_under_its_checksum(tmp_path, place):
    weights = RoundedWeights(
        {"first": Calibrated(get("int2").quantize(torch.randn(8, 64)), None, 0.2, 0.1, "why")},
        {"first": Choice("int2", True)},
        {"format": "int2", "prompts": ("a", "b")},
    )
    path = weights.save(tmp_path / "weights.safetensors")
    assert RoundedWeights.load(path).provenance == {"format": "int2", "prompts": ["a", "b"]}
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["qsched_rounding"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    *owners, name = place.split("/")
    owner = content
    for key in owners:
        owner = owner[key]
    owner[name] = {"provenance": {}, "errors": [0.2, 0.0], "note": "", "version": 1}[name]
    save_file(tensors, path, {"qsched_rounding": json.dumps(content)})
    with pytest.raises(FormatError, match=r"^weights\.safetensors is (damaged|of version 1)"):
        RoundedWeights.load(path)
