"""Evaluation in a real ComfyUI: arms and their numbers, files, kill -9, interrupts, bad input."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time

import pytest
import torch
from device import nearly
from PIL import Image
from test_calibration import captions, node

from demo.task import make
from devtools.server import ComfyServer, ServerError
from qsched_core.objective import Objective
from qsched_core.prompts import PromptSet
from qsched_core.scorers import load_file
from qsched_core.statistics import paired_interval
from qsched_core.task import TaskSource
from qsched_core.trajectory import Candidate

SCORER = "qsched_demo_scorer.safetensors"
HELDOUT = captions(18, True)  # two parts
NAMES = ["baseline", "quantized", "schedule"]


def graph(prompts=HELDOUT, **more) -> dict:
    """4 evaluates the 2-bit model with a ramp's schedule beside the unquantized one."""
    return {
        "1": node("QSchedLoadCheckpoint", ckpt_name="qsched_demo.safetensors", weight_format="int2"),
        "2": node(
            "QSchedCalibrationPrompts",
            source="text", calibration="\n".join(captions(4, False)), heldout="\n".join(prompts), seed=0,
        ),
        "3": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
        "5": node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors"),
        "6": node(
            "QSchedRamp",
            model=["1", 0], scheduler="simple", steps=2, solver="euler",
            x_start=1.0, x_end=1.0, eps_start=1.06, eps_end=1.0,
        ),
        "4": node(
            "QSchedEvaluate",
            **{
                "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "prompts": ["2", 0],
                "objective": ["3", 0], "solver": "euler", "scheduler": "simple", "steps": 2,
                "cfg": 1.0, "width": 96, "height": 96, "schedule": ["6", 0],
                "reference_model": ["5", 0],
            } | more,
        ),
    }  # fmt: skip


def report_of(entry: dict) -> dict:
    return json.loads(entry["outputs"]["4"]["text"][0])


def numbers(report: dict) -> dict:
    return {
        "scores": {name: arm["scores"] for name, arm in report["arms"].items()},
        "comparisons": report["comparisons"],
        "frechet": [distance["value"] for distance in report["frechet"]],
    }


@pytest.fixture(scope="module")
def evaluated(server) -> tuple[dict, dict]:
    prompt = graph(csv_name="qsched/table")
    prompt["7"] = node(
        "QSchedJAQScore", images=["4", 1], objective=["3", 0], prompts="\n".join(HELDOUT)
    )
    prompt["8"] = node("PreviewAny", source=["4", 3])
    prompt["9"] = node("SaveImage", images=["4", 2], filename_prefix="report")
    entry = server.run(prompt)
    return entry, report_of(entry)


def test_three_arms_are_scored_and_compared(evaluated):
    _, report = evaluated
    assert list(report["arms"]) == NAMES
    jaq = {name: report["arms"][name]["scores"]["jaq"] for name in NAMES}
    assert {len(values) for values in jaq.values()} == {18}
    assert report["arms"]["quantized"]["label"] == "quantized (int2)"
    gains = {(c["before"], c["after"]): c["gains"]["jaq"] for c in report["comparisons"]}
    for (before, after), gain in gains.items():
        assert gain == paired_interval(jaq[before], jaq[after]).to_dict()
    assert gains["baseline", "quantized"]["high"] < 0  # two bits are worse than sixteen
    found = {d["arm"]: d["value"] for d in report["frechet"]}
    assert {(c["before"], c["after"]) for c in report["frechet_changes"]} == {
        ("quantized", "schedule")
    }
    assert found.keys() == {"quantized", "schedule"} and min(found.values()) > 0
    # the old fields say the same
    assert report["scores"] == report["arms"]["schedule"]["scores"]
    assert report["base"]["scores"] == report["arms"]["quantized"]["scores"]
    assert report["gain"] == gains["quantized", "schedule"]
    assert report["c_eps"] == pytest.approx([1.06, 1.0]) and report["prompts"] == HELDOUT
    # the baseline makes 2 steps of 18; the first is shared between the other two
    assert report["nfe"] == 36 + 18 + 2 * 18


@pytest.mark.parametrize("arm,weight_format", [("baseline", "none"), ("quantized", "int2")])
def test_the_plain_torch_task_has_the_nodes_scores(evaluated, repo_root, arm, weight_format):
    """The demo as the command evaluates it: one trajectory, one objective, with and without a graph."""
    report = evaluated[1]
    task = make(weight_format, torch.device("cpu"), sigmas=(1.0, 0.75, 0.0))
    prompts = PromptSet(tuple(report["prompts"]), tuple(report["seeds"]))
    pictures = TaskSource(task).images(prompts, [Candidate.identity(task.trajectory)])
    objective = Objective(load_file(repo_root / "demo" / "weights" / "scorer.safetensors"))
    scores = objective.score(pictures[0], prompts.prompts)
    assert scores.jaq == nearly(report["arms"][arm]["scores"]["jaq"], 1e-3)


def test_the_pictures_that_come_out_are_those_that_were_scored(evaluated):
    entry, report = evaluated
    scored = json.loads(entry["outputs"]["7"]["text"][0])["scores"]
    assert scored["jaq"] == nearly(report["scores"]["jaq"], 1e-5)


def test_report_and_files_have_the_numbers(server, evaluated):
    entry, report = evaluated
    text = "".join(entry["outputs"]["8"]["text"])
    assert report["report"] in text and "quantized (int2) against baseline: worse" in text
    picture = Image.open(io.BytesIO(server.image(entry["outputs"]["9"]["images"][0])))
    # three rows of examples below the table; what is in them the report's own tests say
    assert picture.width == 1200 and picture.height > 3 * 96
    folder = server.output / "qsched"
    rows = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    assert len(rows) == 3 * 18
    assert float(rows[-1]["jaq"]) == report["scores"]["jaq"][-1]
    summary = (folder / "table-summary.csv").read_text(encoding="utf-8")
    web = (folder / "table.html").read_text(encoding="utf-8")
    assert web.count("data:image/jpeg;base64,") >= 2
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert repr(report["gain"]["low"]) in summary
    assert not list(folder.glob("*.partial"))


def test_what_is_finished_is_not_made_again(server, evaluated):
    again = report_of(server.run(graph()))  # without files it is another prompt to ComfyUI
    assert again["new_images"] == 0
    assert numbers(again) == numbers(evaluated[1])
    other = graph()
    other["6"]["inputs"]["eps_start"] = 1.03
    assert report_of(server.run(other))["new_images"] == 18


def test_prompts_and_reference_images_can_be_chosen(server, evaluated):
    prompt = graph(evaluate_on="all", reference_images=["10", 0])
    prompt["10"] = node("EmptyImage", width=96, height=96, batch_size=3, color=255)
    del prompt["4"]["inputs"]["reference_model"], prompt["4"]["inputs"]["schedule"]
    report = report_of(server.run(prompt))
    assert list(report["arms"]) == ["quantized"] and len(report["prompts"]) == 22
    assert [d["against"] for d in report["frechet"]] == ["reference images"]
    assert any("3 images are few" in note for note in report["notes"])


def studies(base) -> set:
    return set((base / "user" / "qsched" / "evaluations").glob("*"))


def parts(base) -> int:
    return sum(len(list(folder.glob("part-*.safetensors"))) for folder in studies(base))


@pytest.mark.full
def test_what_a_killed_server_left_another_continues_to_the_same_result(
    server, comfyui_path, server_args
):
    """Two servers of one user folder; the first is killed with kill -9."""
    known, before = studies(server.base), parts(server.base)

    def asked(**more) -> dict:
        prompt = graph(captions(17, True), compare=True, **more)
        del prompt["4"]["inputs"]["reference_model"]
        return prompt

    with ComfyServer(comfyui_path, server.base, extra_args=server_args) as first:
        first.queue(asked())
        deadline = time.monotonic() + 200
        while parts(server.base) == before:
            assert time.monotonic() < deadline, first.log_tail()
            time.sleep(0.005)
        first.kill()
    assert parts(server.base) < before + 4
    resumed = report_of(server.run(asked()))
    assert 0 < resumed["new_images"] < 2 * 17
    for folder in studies(server.base) - known:
        shutil.rmtree(folder)
    whole = report_of(server.run(asked(csv_name="whole")))  # another prompt to ComfyUI
    assert whole["new_images"] == 2 * 17
    for name in NAMES[1:]:
        ours, theirs = (report["arms"][name]["scores"]["jaq"] for report in (resumed, whole))
        assert ours == nearly(theirs, 1e-5)


def test_an_interrupt_stops_it_within_a_step_and_keeps_its_parts(server):
    prompt = graph(captions(60, True), steps=6)
    prompt["6"]["inputs"]["steps"] = 6
    before = parts(server.base)
    prompt_id = server.queue(prompt)
    deadline = time.monotonic() + 200
    while parts(server.base) == before:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.02)
    server.interrupt()
    started = time.monotonic()
    with pytest.raises(ServerError, match="interrupted at node 4"):
        server.wait(prompt_id, timeout=60)
    assert time.monotonic() - started < 20
    assert parts(server.base) < before + 12


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"csv_name": "../outside"}, "csv_name"),
        ({"csv_name": "a:b"}, "csv_name"),
        ({"evaluate_on": "some"}, "evaluate_on"),
        ({"objective": ["2", 0]}, "objective"),
        ({"steps": 0}, "steps"),
        ({"solver": "heun"}, "solver"),
        ({"reference_model": ["11", 0]}, "the reference model has other noise levels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named_before_any_picture(server, change, reason):
    prompt = graph(captions(5, True), **change)
    prompt["11"] = node("ModelSamplingSD3", model=["5", 0], shift=9.0)
    before = parts(server.base)
    with pytest.raises(ServerError, match=reason):
        server.run(prompt)
    assert parts(server.base) == before
