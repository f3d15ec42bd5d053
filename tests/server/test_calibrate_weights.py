"""Calibrate Weights in a real ComfyUI: the demo's model, its file, kill -9, interrupts, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import pytest
from test_calibration import captions, node

from benchmarks.progress import listen
from devtools.server import ComfyServer, ServerError

CHECKPOINT = "qsched_demo.safetensors"
STEPS = 2


def graph(**more) -> dict:
    """2 calibrates the weights; 3 samples with them."""
    settings = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "prompts": ["4", 0],
        "solver": "euler", "scheduler": "simple", "steps": STEPS, "cfg": 1.0, "width": 96,
        "height": 96, "weight_format": "int2",
    }  # fmt: skip
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "4": node(
            "QSchedCalibrationPrompts",
            source="text", calibration="\n".join(captions(12, False)),
            heldout="\n".join(captions(12, True)), seed=0,
        ),
        "2": node("QSchedCalibrateWeights", **(settings | more)),
        "5": node("CLIPTextEncode", clip=["1", 1], text="a red circle on a white background"),
        "6": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "3": node(
            "KSampler",
            model=["2", 0], seed=3, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=["5", 0], negative=["5", 0], latent_image=["6", 0], denoise=1.0,
        ),
        "7": node("SaveLatent", samples=["3", 0], filename_prefix="calibrated"),
    }  # fmt: skip


def figures_of(entry: dict) -> dict:
    return json.loads(entry["outputs"]["2"]["text"][0])


@pytest.fixture(scope="module")
def run(server) -> dict:
    prompt = graph(report_name="reports/{model}-{format}")
    prompt["8"] = node(
        "QSchedSaveModel", model=["2", 0], filename_prefix="diffusion_models/calibrated"
    )
    prompt["9"] = node("QSchedQuantizationReport", model=["2", 0])
    prompt["10"] = node("SaveImage", images=["2", 1], filename_prefix="report")
    heard = listen(server, prompt, "2")
    return server.wait(heard.prompt) | {"heard": heard}


def test_one_bar_rises_over_all_parts_and_each_is_named(run):
    shares = [each.share for each in run["heard"].heard if each.share is not None]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    said = [text for _, text in run["heard"].texts]
    wanted = (
        "loading the models", "encoding prompts: 12 of 12", "sampling the unquantized model: 12 of 12",
        "block 4 of 4", "comparing on held-out prompts: 36 of 36", "calibrated: ",
    )  # fmt: skip
    places = [next(i for i, text in enumerate(said) if part in text) for part in wanted]
    assert places == sorted(places)
    assert said[-1].count("\n") == 2  # the verdict, the warning, the report's file
    assert "few calibration prompts" in said[-1] and "report: " in said[-1]


def test_the_distance_falls_on_prompts_that_it_never_saw(run):
    found = figures_of(run)
    proof = found["proof"]
    assert found["calibrated"] and proof["change"]["high"] < 0 and proof["prompts"] == 12
    assert proof["distance"]["calibrated"] < 0.6 * proof["distance"]["plain"]
    assert found["states"] == 12 * STEPS == found["evaluations"]
    assert f"on {proof['prompts']} prompts that it never saw" in found["report"]
    assert "calibrated: output error" in run["outputs"]["9"]["text"][0]
    assert run["outputs"]["2"]["images"] and run["outputs"]["10"]["images"]


def test_the_saved_file_samples_the_same(server, run):
    path = server.base / "output" / "diffusion_models" / "calibrated_00001_.safetensors"
    assert path.is_file() and "calibrated: " in run["outputs"]["8"]["text"][0]
    models = server.base / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, models / "calibrated.safetensors")
    prompt = graph()
    del prompt["2"], prompt["4"]
    prompt["2"] = node(
        "QSchedLoadDiffusionModel", unet_name="calibrated.safetensors", weight_format="int2"
    )
    again = server.run(prompt)

    def latent(entry):
        return server.image(entry["outputs"]["7"]["latents"][0])

    assert latent(again)[-4096:] == latent(run)[-4096:]


def test_a_finished_walk_is_not_repeated(server, run):
    """The file is there; the node's answer is not kept, since the graph is another."""
    again = server.run(graph(states_per_prompt=2))  # as many as there are: the same states
    one, other = figures_of(run), figures_of(again)
    assert one["proof"] == other["proof"] and one["seconds"] == other["seconds"]


def test_the_report_is_one_page(server, run):
    path = server.base / "output" / "reports" / "qsched_demo-int2.html"
    found = figures_of(run)
    assert found["files"] == [str(path)]
    text = path.read_text(encoding="utf-8")
    change = found["proof"]["change"]
    assert f"{change['mean']:+.5f} [{change['low']:+.5f}, {change['high']:+.5f}]" in text
    assert text.count("<img ") == 9 and "<h2>Layers</h2>" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_another_report_is_never_replaced(server, run):
    path = server.base / "output" / "reports" / "qsched_demo-int2.html"
    again = graph(report_name="reports/{model}-{format}.html", amount=4.0)  # which is not used
    assert figures_of(server.run(again))["files"] == [str(path)]
    mine = path.read_bytes() + b"\n"
    path.write_bytes(mine)
    again["2"]["inputs"]["amount"] = 5.0
    other = path.with_name("qsched_demo-int2-2.html")
    assert figures_of(server.run(again))["files"] == [str(other)]
    assert path.read_bytes() == mine == other.read_bytes() + b"\n"
    assert figures_of(server.run(graph()))["files"] == []


@pytest.mark.parametrize("name", ["../out", "con", "a/{seed}", "x" * 3000])
def test_a_report_of_a_bad_name_is_refused_before_any_work(server, name):
    with pytest.raises(ServerError, match=r"node 2 .*RoundingError: report_name: name="):
        server.run(graph(report_name=name, seed=99), 60)


@pytest.mark.full
def test_a_killed_server_goes_on_to_the_same_weights(
    run, server_base, tmp_path, comfyui_path, server_args
):
    base = tmp_path / "killed"
    shutil.copytree(server_base / "models", base / "models", copy_function=os.link)
    with ComfyServer(comfyui_path, base, extra_args=server_args) as killed:
        killed.queue(graph())
        deadline = time.monotonic() + 300
        while not list(base.rglob("rounding-*/blocks/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.kill()
    kept = {p.name for p in base.rglob("rounding-*/blocks/*.safetensors")}
    with ComfyServer(comfyui_path, base, extra_args=server_args) as again:
        found = figures_of(again.run(graph()))
    assert kept and found["proof"] == figures_of(run)["proof"]


def test_the_user_can_stop_it(server):
    prompt_id = server.queue(graph(seed=7))
    deadline = time.monotonic() + 300
    while not list(server.base.rglob("rounding-*/blocks/*.safetensors")):
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.02)
    server.interrupt()
    with pytest.raises(ServerError, match="interrupted at node 2"):
        server.wait(prompt_id, timeout=60)


def test_a_quantized_model_is_refused_in_a_sentence(server):
    prompt = graph()
    prompt["1"] = node("QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format="int8")
    with pytest.raises(ServerError, match="model is quantized already"):
        server.run(prompt)


@pytest.mark.full
def test_a_size_is_kept_to_by_formats_of_different_layers(server):
    prompt = graph(size="bits a weight", amount=3.2, layers="*adaLN*=nf4", weight_format="int3")
    prompt["8"] = node("QSchedSaveModel", model=["2", 0], filename_prefix="diffusion_models/mixed")
    run = server.run(prompt)
    found = figures_of(run)["size"]
    assert found["bits"] <= 3.2 and len({row["format"] for row in found["layers"]}) > 1
    assert len(found["uniform"]) == 2 and found["line"] > 0
    kept = "int2" if found["kept"] == "int2" else "mixed"
    assert f": {kept}" in run["outputs"]["8"]["text"][0]
