"""What was learned, kept in a workflow: found again as long as nothing before it has changed."""

from __future__ import annotations

import copy
import importlib

import inside  # noqa: F401  the pack becomes importable
import pytest

remember = importlib.import_module("qsched_pack.nodes.host.remember")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
trajectories = importlib.import_module("qsched_pack.qsched_core.trajectory")

SCHEDULE = schedules.QSchedule.identity(
    trajectories.Trajectory.of([1.0, 0.5, 0.0], "euler", True), source="calibration"
)
PROMPT = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a"}},
    "2": {"class_type": "QSchedCalibrationPrompts", "inputs": {"source": "bundled", "seed": 0}},
    "4": {
        "class_type": "QSchedJAQCalibrator",
        "inputs": {"model": ["1", 0], "prompts": ["2", 0], "steps": 2, "learned": ""},
    },
    "5": {"class_type": "QSchedSaveSchedule", "inputs": {"schedule": ["4", 0], "name": "x"}},
    "9": {"class_type": "QSchedKSampler", "inputs": {"schedule": ["5", 0], "seed": 7}},
}
WORKFLOW = {
    "nodes": [
        {
            "id": 4,
            "type": "QSchedJAQCalibrator",
            "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
            "widgets_values": [2, 0, "fixed", "", "normal"],
        }
    ]
}


def remembered(start: str = "9", prompt=PROMPT) -> tuple[dict, dict]:
    prompt, info = copy.deepcopy(prompt), {"workflow": copy.deepcopy(WORKFLOW)}
    remember.remember(SCHEDULE, prompt, info, start)
    return prompt, info["workflow"]


@pytest.mark.parametrize("start", ["9", "5", "4"])
def test_it_is_put_into_prompt_and_workflow_alone(start):
    prompt, workflow = remembered(start)
    text = prompt["4"]["inputs"].pop("learned")
    assert workflow["nodes"][0]["widgets_values"] == [2, 0, "fixed", text, "normal"]
    expected = copy.deepcopy(PROMPT)
    expected["4"]["inputs"].pop("learned")
    assert prompt == expected
    assert remember.recalled(text, PROMPT, "4") == SCHEDULE


def test_other_ids_are_the_same_graph():
    text = remembered()[0]["4"]["inputs"]["learned"]
    renamed = {f"n{key}": copy.deepcopy(node) for key, node in PROMPT.items()}
    for node in renamed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [f"n{value[0]}", value[1]]
    assert remember.recalled(text, renamed, "n4") == SCHEDULE


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [("4", "steps", 3), ("1", "ckpt_name", "b"), ("2", "seed", 1), ("4", "negative", "x")],
)
def test_a_change_before_it_makes_it_another_graph(key, name, value):
    text = remembered()[0]["4"]["inputs"]["learned"]
    changed = copy.deepcopy(PROMPT)
    changed[key]["inputs"][name] = value
    assert remember.recalled(text, changed, "4") is None


def test_a_change_after_it_does_not():
    text = remembered()[0]["4"]["inputs"]["learned"]
    changed = copy.deepcopy(PROMPT)
    changed["9"]["inputs"]["seed"] = 8
    assert remember.recalled(text, changed, "4") == SCHEDULE


@pytest.mark.parametrize("text", ["", " ", "{}", "[1]", "no json", '{"graph": 1}', "[" * 5000])
def test_anything_else_is_nothing(text):
    assert remember.recalled(text, PROMPT, "4") is None


def test_an_edited_schedule_is_not_the_calibrators():
    prompt = copy.deepcopy(PROMPT)
    prompt["6"] = {"class_type": "QSchedEditSchedule", "inputs": {"schedule": ["4", 0]}}
    prompt["9"]["inputs"]["schedule"] = ["6", 0]
    again, workflow = remembered(prompt=prompt)
    assert again == prompt
    assert workflow == WORKFLOW
