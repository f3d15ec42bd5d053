"""Inputs that are wired are not known when a graph is checked: the host gives None for them."""

from __future__ import annotations

import importlib

import inside  # noqa: F401  ComfyUI and the pack become importable
import pytest

inputs = importlib.import_module("qsched_pack.nodes.inputs")
loading = importlib.import_module("qsched_pack.nodes.loading")
prompts = importlib.import_module("qsched_pack.nodes.prompts")
scorers = importlib.import_module("qsched_pack.qsched_core.scorers")


@pytest.mark.parametrize("wired", ["weight_format", "layers"])
@pytest.mark.parametrize("node", [loading.QSchedQuantizeModel, loading.QSchedQuantizeTextEncoder])
def test_a_wired_format_or_choice_of_layers_is_left_to_the_run(node, wired):
    values = {"weight_format": "int2", "layers": "nonsense"}
    assert node.validate_inputs(**values) is not True
    assert node.validate_inputs(**values | {"layers": "", wired: None}) is True


@pytest.mark.parametrize("wired", ["name", "weight_format", "layers"])
@pytest.mark.parametrize(
    ("node", "file"),
    [
        (loading.QSchedLoadDiffusionModel, "unet_name"),
        (loading.QSchedLoadCheckpoint, "ckpt_name"),
    ],
)
def test_a_loader_s_wired_input_is_left_to_the_run(node, file, wired):
    values = {file: "nothing.safetensors", "weight_format": "int2", "layers": ""}
    assert "nothing.safetensors" in node.validate_inputs(**values)
    assert node.validate_inputs(**values | {file if wired == "name" else wired: None}) is True


@pytest.mark.parametrize("wired", ["calibration", "heldout", "categories", "file"])
def test_a_wired_text_of_prompts_is_left_to_the_run(wired):
    """Inputs of this node are lists, and a wired one is a tuple."""
    values = {"source": ["file"], "calibration": [""], "heldout": [""], "categories": [""]}
    values |= {"file": ["nothing.txt"], wired: (None,)}
    assert prompts.QSchedCalibrationPrompts.validate_inputs(**values) is True


def test_a_long_objective_is_not_shown_whole():
    with pytest.raises(scorers.ScorerError, match="JAQ Objective node") as error:
        inputs.check_objective("\u202ex" * 100_000)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()
