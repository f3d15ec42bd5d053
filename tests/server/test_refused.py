"""One mistake is one error, on the input that has it, with the sentence in its first line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from test_calibration import SCORER, node, trajectory

CHECKPOINT = "qsched_demo.safetensors"
PICTURES = {k: v for k, v in trajectory().items() if k not in ("prompts", "objective")}
SAMPLED = {
    "model": ["1", 0], "steps": 2, "cfg": 1.0, "solver": "tcd", "scheduler": "simple",
    "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["7", 0],
}  # fmt: skip
# What the nodes below are given by.
GIVERS = {
    "1": node("QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format="int2"),
    "2": node("QSchedCalibrationPrompts", source="bundled", calibration="", heldout="", seed=0),
    "3": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
    "6": node("CLIPTextEncode", clip=["1", 1], text="a red ring"),
    "7": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
    "8": node("QSchedRamp", model=["1", 0], solver="euler", scheduler="simple", steps=2,
              x_start=1.0, x_end=1.0, eps_start=1.0, eps_end=1.0),
}  # fmt: skip
# A right graph for each node, where "it" is the node and "end" what shows its result.
RIGHT = {
    "QSchedLoadCheckpoint": {"ckpt_name": CHECKPOINT, "weight_format": "int2"},
    "QSchedQuantizeModel": {"model": ["1", 0], "weight_format": "int2"},
    "QSchedQuantizeTextEncoder": {"clip": ["1", 1], "weight_format": "int8"},
    "QSchedSaveModel": {"model": ["1", 0], "filename_prefix": "saved"},
    "QSchedCalibrateWeights": {
        **{k: v for k, v in trajectory().items() if k != "objective"},
        "weight_format": "int3",
    },
    "QSchedCalibrationPrompts": GIVERS["2"]["inputs"],
    "QSchedJAQObjective": GIVERS["3"]["inputs"],
    "QSchedJAQCalibrator": trajectory(search="gp", budget="search's own", seed=0, guard=False),
    "QSchedEvaluate": trajectory(),
    "QSchedRankCandidates": {
        **PICTURES, "prompts": "a red ring", "ranking": "", "study": "x", "seed": 0,
    },
    "QSchedKSampler": {**SAMPLED, "seed": 1, "denoise": 1.0},
    "QSchedKSamplerAdvanced": {
        **SAMPLED, "add_noise": "enable", "noise_seed": 1, "start_at_step": 0, "end_at_step": 9,
        "return_with_leftover_noise": "disable",
    },
    "QSchedSampler": {"schedule": ["8", 0], "solver": "tcd"},
    "QSchedRamp": GIVERS["8"]["inputs"],
    "QSchedSaveSchedule": {"schedule": ["8", 0], "name": "x"},
    "QSchedEditSchedule": {
        "schedule": ["8", 0], "step": "one step", "step.number": 1, "mode": "add", "c_x": 0.0,
        "c_eps": 0.0,
    },
    "QSchedScheduleFromText": {"text": "{}"},
    "QSchedSigmas": {"model": ["1", 0], "steps": "number", "steps.number": 2},
}  # fmt: skip
WRONG = [
    ("QSchedLoadCheckpoint", "ckpt_name", "none.safetensors", "not in"),
    ("QSchedLoadCheckpoint", "weight_format", "int5", "'int5' not in"),
    ("QSchedLoadCheckpoint", "layers", "mlp=nf5", "'nf5'"),
    ("QSchedQuantizeModel", "weight_format", "int5", "'int5' not in"),
    ("QSchedQuantizeModel", "layers", "mlp", "layers"),
    ("QSchedQuantizeTextEncoder", "layers", "=nf4", "layers"),
    ("QSchedSaveModel", "filename_prefix", "con.x/y", "filename_prefix='con.x/y'"),
    ("QSchedCalibrateWeights", "weight_format", "int5", "int5"),
    ("QSchedCalibrateWeights", "size", "huge", "'huge' not in"),
    ("QSchedCalibrateWeights", "amount", 0.0, "0.0 smaller than min of 0.1"),
    ("QSchedCalibrateWeights", "states_per_prompt", 0, "0 smaller than min of 1"),
    ("QSchedCalibrateWeights", "steps", 0, "0 smaller than min of 1"),
    ("QSchedCalibrationPrompts", "source", "nowhere", "'nowhere' not in"),
    ("QSchedJAQObjective", "quality", "clip-iqa", "clip-iqa"),
    ("QSchedJAQObjective", "quality_weight", -1.0, "-1.0 smaller than min of 0.0"),
    ("QSchedJAQCalibrator", "budget.number", 0, "0 smaller than min of 1"),
    ("QSchedJAQCalibrator", "low.number", 1.5, "1.5 bigger than max of 1.0"),
    ("QSchedJAQCalibrator", "high.number", 0.5, "0.5 smaller than min of 1.0"),
    ("QSchedJAQCalibrator", "level_grid.number", 1, "1 smaller than min of 2"),
    ("QSchedJAQCalibrator", "preset", "slow", "'slow' not in"),
    ("QSchedJAQCalibrator", "storage", "postgresql://host/db", "storage"),
    ("QSchedJAQCalibrator", "width", 8, "8 smaller than min of 16"),
    ("QSchedEvaluate", "csv_name", "../outside", "csv_name"),
    ("QSchedEvaluate", "evaluate_on", "none", "'none' not in"),
    ("QSchedEvaluate", "cfg", -1.0, "-1.0 smaller than min of 0.0"),
    ("QSchedRankCandidates", "prompts", "", "prompts has 0 lines"),
    ("QSchedRankCandidates", "candidates", 1, "1 smaller than min"),
    ("QSchedRankCandidates", "height", "tall", "height"),
    ("QSchedKSampler", "denoise", 0.0, "denoise=0.0 must be above 0"),
    ("QSchedKSampler", "gamma.number", 1.5, "1.5 bigger than max of 1.0"),
    ("QSchedKSampler", "solver", "heun", "'heun' not in"),
    ("QSchedKSampler", "scheduler", "none", "'none' not in"),
    ("QSchedKSamplerAdvanced", "start_at_step", -1, "-1 smaller than min of 0"),
    ("QSchedKSamplerAdvanced", "steps", 1001, "1001 bigger than max of 1000"),
    ("QSchedSampler", "mode", "loose", "'loose' not in"),
    ("QSchedRamp", "x_start", 9.0, "9.0 bigger than max of 4.0"),
    ("QSchedSaveSchedule", "name", "../outside", "name"),
    ("QSchedEditSchedule", "step.number", 0, "0 smaller than min of 1"),
    ("QSchedScheduleFromText", "text", "{", "text"),
    ("QSchedSigmas", "denoise", 0.0, "denoise=0.0 must be above 0"),
    ("QSchedSigmas", "steps.number", 0, "0 smaller than min of 1"),
]


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


def graph(info, kind: str, **change) -> dict:
    """A node of this kind with all that feeds it, and one that shows what it gives."""
    prompt = {**GIVERS, "it": node(kind, **RIGHT[kind] | change)}
    if not info[kind]["output_node"]:
        prompt["end"] = node("PreviewAny", source=["it", 0])
    return prompt


def errors(server, prompt: dict) -> dict[str, list[dict]]:
    """ComfyUI's errors by node; AssertionError if the prompt is taken."""
    request = urllib.request.Request(
        f"{server.url}/prompt",
        json.dumps({"prompt": prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60).close()
    content = json.loads(refused.value.read())["node_errors"]
    return {name: found["errors"] for name, found in content.items() if found["errors"]}


def test_every_kind_of_node_has_a_mistake_here(info):
    assert {kind for kind, *_ in WRONG} == set(RIGHT)
    assert {kind for kind in info if kind.startswith("QSched")} - set(RIGHT) == {
        # no input of theirs can be mistaken, but for a file that is not there
        "QSchedAroundSampler",
        "QSchedJAQScore",
        "QSchedLoadDiffusionModel",
        "QSchedLoadSchedule",
        "QSchedQuantizationReport",
        "QSchedShowSchedule",
    }


@pytest.mark.parametrize(("kind", "name", "value", "said"), WRONG)
def test_one_mistake_is_one_error_on_its_input(server, info, kind, name, value, said):
    change = {name: value}
    if name.endswith(".number"):
        chosen = "one step" if kind == "QSchedEditSchedule" else "number"
        change[name.partition(".")[0]] = chosen
    found = errors(server, graph(info, kind, **change))
    assert list(found) == ["it"], found
    (error,) = found["it"]
    assert error["extra_info"]["input_name"] == name
    first = f"{error['message']}: {error['details']}".splitlines()[0]
    assert said in first, first
    assert "qsched_core" not in first and "nodes." not in first
