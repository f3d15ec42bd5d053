"""Inputs that are wired are not known when a graph is checked: the host gives None for them."""

from __future__ import annotations

import importlib

import inside  # noqa: F401  ComfyUI and the pack become importable
import pytest

inputs = importlib.import_module("qsched_pack.nodes.inputs")
loading = importlib.import_module("qsched_pack.nodes.loading")
scorers = importlib.import_module("qsched_pack.qsched_core.scorers")


LOADERS = (
    loading.QSchedLoadDiffusionModel,
    loading.QSchedLoadCheckpoint,
    loading.QSchedQuantizeModel,
    loading.QSchedQuantizeTextEncoder,
)


@pytest.mark.parametrize("node", LOADERS)
def test_a_wired_choice_of_layers_is_left_to_the_run(node):
    assert node.validate_inputs(layers="nonsense") is not True
    assert node.validate_inputs(layers=None) is True


def test_a_long_objective_is_not_shown_whole():
    with pytest.raises(scorers.ScorerError, match="JAQ Objective node") as error:
        inputs.check_objective("\u202ex" * 100_000)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()
