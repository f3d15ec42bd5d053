"""The graphs that the demo posts to ComfyUI, in API format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WORKFLOW = Path(__file__).parent / "workflow" / "api" / "qsched_learn_and_sample.json"
CHECKPOINT = "qsched_demo.safetensors"
SIZE, STEPS = 96, 4
TRAJECTORY = {
    "solver": "euler", "scheduler": "simple", "steps": STEPS, "cfg": 1.0, "width": SIZE,
    "height": SIZE,
}  # fmt: skip
UNQUANTIZED = "unquantized"
PARTS = "parts"  # the node that loads what is not quantized


def shipped() -> dict:
    """The shipped workflow: from the loader to the saved picture, and the report beside it."""
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def loader(weight_format: str, file: str | None = None) -> dict:
    """CheckpointLoaderSimple, or the quantized loader in a format: of the checkpoint, or a ``file``."""
    if file is not None:
        inputs = {"unet_name": file, "weight_format": weight_format}
        return {"class_type": "QSchedLoadDiffusionModel", "inputs": inputs}
    if weight_format == UNQUANTIZED:
        return {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}
    return {
        "class_type": "QSchedLoadCheckpoint",
        "inputs": {"ckpt_name": CHECKPOINT, "weight_format": weight_format},
    }


def shared_parts(graph: dict) -> dict:
    """``graph`` with text encoder and VAE from one loader, the same in every graph of the demo.

    ComfyUI then keeps both from graph to graph, and the pack the prompts that were encoded.
    """
    for node in graph.values():
        for name, link in node["inputs"].items():
            if name in ("clip", "vae") and link[0] == "1":
                node["inputs"][name] = [PARTS, link[1]]
    return graph | {PARTS: loader(UNQUANTIZED)}


def prompts_node(calibration: Sequence[str], heldout: Sequence[str], seed: int) -> dict:
    return {
        "class_type": "QSchedCalibrationPrompts",
        "inputs": {
            "source": "text",
            "calibration": "\n".join(calibration),
            "heldout": "\n".join(heldout),
            "seed": seed,
        },
    }


def calibrate_weights(
    weight_format: str, prompts: Sequence[str], heldout: Sequence[str], name: str
) -> dict:
    """Round the demo's weights for ``prompts``, and save the model for ComfyUI's loaders."""
    graph = {
        "1": loader(UNQUANTIZED),
        "2": prompts_node(prompts, heldout, 0),
        "4": {
            "class_type": "QSchedCalibrateWeights",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "prompts": ["2", 0],
                "weight_format": weight_format,
                "states_per_prompt": 1,  # many prompts with one step are better than few with many
                **TRAJECTORY,
            },
        },
        "5": {
            "class_type": "QSchedSaveModel",
            "inputs": {"model": ["4", 0], "filename_prefix": f"diffusion_models/{name}"},
        },
        "6": {
            "class_type": "SaveImage",
            "inputs": {"images": ["4", 1], "filename_prefix": f"demo/{name}"},
        },
    }
    return shared_parts(graph)


def learn(weight_format: str, search: str, guard: bool, name: str, file: str | None = None) -> dict:
    """The shipped workflow: learn a schedule, save it under ``name``, sample a picture with it.

    Without the guard nothing hangs on the held-out prompts: two are left, the fewest there may be.
    """
    graph = shared_parts(shipped())
    graph["1"] = loader(weight_format, file) | {"_meta": graph["1"]["_meta"]}
    if not guard:
        lines = graph["2"]["inputs"]["heldout"].splitlines()
        graph["2"]["inputs"]["heldout"] = "\n".join(lines[:2])
    graph["4"]["inputs"] |= {"search": search, "guard": guard}
    graph["5"]["inputs"]["name"] = name
    return graph


def evaluate(
    weight_format: str,
    schedule: str | None,
    prompts: tuple[str, ...],
    seed: int,
    prefix: str,
    file: str | None = None,
) -> dict:
    """Score ``prompts`` without a schedule, or with the saved one, and keep the pictures."""
    graph = {
        "1": loader(weight_format, file),
        "2": prompts_node(["unused"], prompts, seed),
        "3": shipped()["3"],
        "4": {
            "class_type": "QSchedEvaluate",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "prompts": ["2", 0],
                "objective": ["3", 0],
                **TRAJECTORY,
            },
        },
        "6": {"class_type": "SaveImage", "inputs": {"images": ["4", 1], "filename_prefix": prefix}},
    }
    if schedule is not None:
        graph["7"] = {"class_type": "QSchedLoadSchedule", "inputs": {"schedule_name": schedule}}
        graph["4"]["inputs"]["schedule"] = ["7", 0]
    return shared_parts(graph)
