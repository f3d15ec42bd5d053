"""Calibration in a real ComfyUI: it learns, survives kill -9 and interrupts, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
from device import nearly

from demo.shapes import sample_scenes
from devtools.server import ComfyServer, ServerError

SCORER = "qsched_demo_scorer.safetensors"


def captions(count: int, held_out: bool) -> list[str]:
    scenes = sample_scenes(count + 4, np.random.default_rng(count), held_out)
    return list(dict.fromkeys(scene.caption() for scene in scenes))[:count]


CALIBRATION, HELDOUT = captions(4, False), captions(6, True)


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def trajectory(**more) -> dict:
    return {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2],
        "prompts": ["2", 0], "objective": ["3", 0],
        "solver": "euler", "scheduler": "simple", "steps": 2, "cfg": 1.0, "width": 96, "height": 96,
    } | more  # fmt: skip


def graph(seed: int = 0, budget: int = 4, search: str = "gp+steps") -> dict:
    return {
        "1": node("QSchedLoadCheckpoint", ckpt_name="qsched_demo.safetensors", weight_format="int2"),
        "2": node(
            "QSchedCalibrationPrompts",
            source="text", calibration="\n".join(CALIBRATION), heldout="\n".join(HELDOUT), seed=0,
        ),
        "3": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
        "4": node(
            "QSchedJAQCalibrator",
            **trajectory(search=search, budget=budget, seed=seed, guard=False),
        ),
    }  # fmt: skip


def report_of(entry: dict) -> dict:
    return json.loads(entry["outputs"]["4"]["text"][0])


def coefficients(report: dict) -> dict:
    return json.loads(report["schedule"])["correction"]


@pytest.fixture(scope="module")
def calibrated(server) -> tuple[dict, dict]:
    """A history entry of calibrate, evaluate and score, and the calibrator's report."""
    prompt = graph()
    prompt["5"] = node("QSchedEvaluate", **trajectory(schedule=["4", 0], compare=True))
    prompt["6"] = node(
        "QSchedJAQScore", images=["5", 1], objective=["3", 0], prompts="\n".join(HELDOUT)
    )
    entry = server.run(prompt)
    return entry, report_of(entry)


def test_a_calibration_reports_schedule_scores_and_cost(calibrated):
    entry, report = calibrated
    assert len(report["trials"]) == 5
    first = report["trials"][0]
    assert set(first["c_x"] + first["c_eps"]) == {1.0}
    best = max(report["trials"], key=lambda trial: trial["jaq"])
    assert report["calibration"]["after"]["jaq"] == best["jaq"]
    assert coefficients(report)["c_x"] == best["c_x"]
    # the first of the two steps is shared: 4 prompts once, then 4 candidates of 4; the last one
    # differs from another in the last step alone, which costs no evaluation
    held_out = 6 + 2 * 6
    assert [trial["nfe"] for trial in report["trials"]][-1] == 0
    assert report["nfe"] == 4 + 4 * 4 + held_out
    assert entry["outputs"]["4"]["images"]
    assert report["text"] in report["report"]


def test_evaluation_and_score_agree_with_the_calibrators_held_out_scores(calibrated):
    entry, report = calibrated
    evaluated, scored = (json.loads(entry["outputs"][k]["text"][0]) for k in "56")
    assert evaluated["scores"]["jaq"] == nearly(report["heldout"]["scores_after"]["jaq"], 1e-3)
    assert evaluated["base"]["scores"]["jaq"] == nearly(
        report["heldout"]["scores_before"]["jaq"], 1e-3
    )
    assert scored["scores"]["jaq"] == nearly(evaluated["scores"]["jaq"], 1e-4)
    assert evaluated["prompts"] == HELDOUT


@pytest.mark.full
def test_a_calibration_killed_half_way_continues_to_the_same_result(
    server, server_base, comfyui_path, server_args, tmp_path, calibrated
):
    base = tmp_path / "killed"
    shutil.copytree(server_base / "models", base / "models", copy_function=os.link)
    studies = base / "user" / "qsched" / "studies"

    def finished() -> int:
        return sum(path.read_bytes().count(b'"scores"') for path in studies.glob("*.journal"))

    with ComfyServer(comfyui_path, base, extra_args=server_args) as first:
        first.queue(graph())
        deadline = time.monotonic() + 200
        while finished() < 2:
            assert time.monotonic() < deadline, first.log_tail()
            time.sleep(0.02)
        first.kill()
    done = finished()
    with ComfyServer(comfyui_path, base, extra_args=server_args) as second:
        report = report_of(second.run(graph()))
        again = graph()
        again["4"]["inputs"]["guard"] = True
        repeated = report_of(second.run(again))
    assert 0 < report["new_trials"] <= 5 - min(done, 4)
    assert coefficients(report) == coefficients(calibrated[1])
    assert [t["jaq"] for t in report["trials"]] == nearly(
        [t["jaq"] for t in calibrated[1]["trials"]], 1e-5
    )
    assert repeated["new_trials"] == 0


def test_an_interrupt_stops_a_calibration_and_keeps_its_trials(server):
    prompt = graph(seed=5, budget=60, search="gp")
    prompt_id = server.queue(prompt)
    studies = server.base / "user" / "qsched" / "studies"
    before = {path: path.read_bytes().count(b'"scores"') for path in studies.glob("*.journal")}
    deadline = time.monotonic() + 200
    while not any(
        path.read_bytes().count(b'"scores"') > before.get(path, 0)
        for path in studies.glob("*.journal")
    ):
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.05)
    server.interrupt()
    started = time.monotonic()
    with pytest.raises(ServerError, match="interrupted at node 4"):
        server.wait(prompt_id, timeout=60)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "where,change,reason",
    [
        ("2", {"heldout": " \n# none"}, "heldout has no prompts"),
        ("2", {"heldout": CALIBRATION[0]}, "is a calibration prompt too"),
        ("3", {"quality": "beauty"}, "quality='beauty' is unknown"),
        ("3", {"quality_weight": -1.0}, "quality_weight"),
        ("3", {"clip_name": "none.safetensors"}, "clip_name"),
        ("3", {"architecture": "ViT-Z"}, "architecture='ViT-Z'"),
        ("3", {"clip_name": "(by open_clip's name)"}, "architecture is empty"),
        (
            "3",
            {"clip_name": "(by open_clip's name)", "architecture": "ViT-B-32/openai"},
            "allow_download",
        ),
        (
            "3",
            {"clip_name": "ViT-B-32/laion2b_s34b_b79k (0.6 GB, MIT)"},
            "would be downloaded from the internet; set allow_download to agree",
        ),
        ("3", {"quality": "pyiqa:musiq"}, "run: pip install pyiqa"),
        ("4", {"search": "luck"}, "search: 'luck' not in"),
        ("4", {"budget": 2}, "budget=2 is too small"),
        ("4", {"solver": "heun"}, "solver"),
        ("4", {"width": 97}, "width=97"),
        ("4", {"width": 264}, "qsched.SourceError: width=264 is more than .*; set at most 256"),
        ("4", {"steps": 0}, "steps"),
        ("4", {"objective": ["2", 0]}, "objective"),
    ],
)
def test_bad_inputs_are_named(server, where, change, reason):
    prompt = graph()
    prompt[where]["inputs"] |= change
    with pytest.raises(ServerError, match=reason):
        server.run(prompt)


def test_as_many_prompts_as_images_are_needed(server, calibrated):
    prompt = graph()
    prompt["5"] = node("EmptyImage", width=96, height=96, batch_size=3, color=0)
    prompt["6"] = node("QSchedJAQScore", images=["5", 0], objective=["3", 0], prompts="a\nb")
    del prompt["4"]
    with pytest.raises(ServerError, match="prompts has 2 lines for 3 images"):
        server.run(prompt)
    prompt["6"]["inputs"]["prompts"] = "a red circle"
    scores = json.loads(server.run(prompt)["outputs"]["6"]["text"][0])
    assert len(scores["scores"]["jaq"]) == 3
    assert scores["scores"]["jaq"] == nearly([scores["means"]["jaq"]] * 3, 1e-5)


def test_learned_noise_levels_go_from_the_search_to_the_picture(server):
    """levels-dp from the graph to the picture, with levels that no scheduler of 2 steps has."""
    prompt = graph(search="levels-dp", budget=0)
    prompt["4"]["inputs"]["level_grid"] = 6
    latent = node("EmptySD3LatentImage", width=96, height=96, batch_size=1)
    positive = node("CLIPTextEncode", clip=["1", 1], text=CALIBRATION[0])
    prompt |= {"5": latent, "6": positive}
    prompt["7"] = node(
        "QSchedKSampler",
        model=["1", 0], seed=1, steps=9, cfg=1.0, solver="euler", scheduler="as learned",
        positive=["6", 0], negative=["6", 0], latent_image=["5", 0], denoise=1.0, schedule=["4", 0],
    )  # fmt: skip
    prompt["8"] = node("VAEDecode", samples=["7", 0], vae=["1", 2])
    prompt["9"] = node("PreviewImage", images=["8", 0])
    entry = server.run(prompt)
    report = report_of(entry)
    assert report["new_trials"] == len(report["trials"]) == 4
    assert all(
        trial["sigmas"][0] == 1.0 and len(trial["sigmas"]) == 3 for trial in report["trials"]
    )
    learned = json.loads(report["schedule"])
    assert learned["sigmas"] == report["best_trajectory"]["sigmas"]
    assert learned["provenance"]["search"]["levels"]["nfe"] == 4 * (6 + 2)
    assert entry["outputs"]["9"]["images"]


def test_a_search_goes_on_whichever_way_its_numbers_are_given(server):
    """A plain number, as graphs of before have it, and a chosen one are the same search."""
    prompt, plain = graph(seed=8, search="gp"), {"low": 0.7, "high": 0.0, "level_grid": 0}
    prompt["4"]["inputs"] |= plain
    before = report_of(server.run(prompt))
    assert before["new_trials"] == 5
    chosen = {
        "budget": "number", "budget.number": 4, "low": "number", "low.number": 0.7,
        "high": "search's own", "level_grid": "automatic",
    }  # fmt: skip
    prompt["4"]["inputs"] |= chosen
    after = report_of(server.run(prompt))
    assert after["new_trials"] == 0
    assert coefficients(after) == coefficients(before)


def test_a_schedule_is_learned_by_rankings_round_after_round(server):
    def queued(ranking: str, **more):
        given = {
            "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2],
            "prompts": "\n".join(CALIBRATION[:2]), "ranking": ranking, "study": "of this test",
            "solver": "euler", "scheduler": "simple", "steps": 2, "cfg": 1.0, "width": 96,
            "height": 96, "seed": 5, "candidates": 3, "spread": 0.2,
        }  # fmt: skip
        prompt = {"1": graph()["1"], "2": node("QSchedRankCandidates", **given | more)}
        prompt["3"] = node("QSchedShowSchedule", schedule=["2", 0])
        outputs = server.run(prompt)["outputs"]
        assert outputs["2"]["images"]
        return outputs["2"]["text"][0], json.loads(outputs["3"]["text"][0])

    text, first = queued("")
    assert "round 1: random changes" in text and "0 rankings so far" in text
    assert set(first["correction"]["c_x"] + first["correction"]["c_eps"]) == {1.0}
    text, _ = queued("1: 2 1")
    assert "round 2: steps the way" in text
    text, learned = queued("2: 2")
    assert "round 3" in text and "2 rankings so far" in text
    assert learned["correction"] != first["correction"]
    assert learned["provenance"]["rankings"]["count"] == 2
    with pytest.raises(ServerError, match="this is round 3"):
        queued("7: 1")
    with pytest.raises(ServerError, match="prompts has 0 lines"):
        queued("", prompts=" ")
    with pytest.raises(ServerError, match=r"Custom validation failed.*half of a letter"):
        queued("", prompts="\ud800")
    with pytest.raises(ServerError, match="prompts has 100000 characters; at most 65536"):
        queued("", prompts="\n" * 100_000)
    assert "0 rankings so far" in queued("", study="another")[0]
    parts = graph()

    def beside(**more):
        given = {
            "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "ranking": "2: 2", "study": "of this test", "solver": "euler", "scheduler": "simple",
            "steps": 2, "cfg": 1.0, "width": 96, "height": 96, "seed": 5, "candidates": 3,
            "spread": 0.2, "prompts": "\n".join(CALIBRATION[:2]),
        }  # fmt: skip
        prompt = {key: parts[key] for key in ("1", "2", "3")}
        prompt["20"] = node("QSchedRankCandidates", **given | more)
        return server.run(prompt)["outputs"]["20"]["text"][0]

    text = beside(objective=["3", 0], heldout=["2", 0])
    assert "JAQ over c = 1, held-out: " in text and "2 rankings so far" in text
    with pytest.raises(ServerError, match="heldout is not connected"):
        beside(objective=["3", 0])
