"""Objectives, prompts and the control through real graphs."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from test_calibration import CALIBRATION, HELDOUT, SCORER, graph, node, report_of, trajectory

from devtools.server import ServerError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 384, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 1},
}
PICTURES = "a red circle and a blue square\na yellow ring"


@pytest.fixture(scope="module")
def weights(server):
    """Tiny weights in the scorers' own keys, where the server looks for them."""
    folder = server.base / "models" / "clip_score"
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / "tiny_hps.safetensors")
    torch.save(torch.nn.Linear(3, 1).state_dict(), folder / "narrow.pth")
    yield
    for name in ("tiny_hps.safetensors", "narrow.pth"):
        (folder / name).unlink()


def scored(server, **objective) -> dict:
    given = {"clip_name": SCORER, "quality": "clip_iqa", "quality_weight": 2.0} | objective
    prompt = {
        "3": node("QSchedJAQObjective", **given),
        "5": node("EmptyImage", width=96, height=96, batch_size=2, color=0xFF0000),
        "6": node("QSchedJAQScore", images=["5", 0], objective=["3", 0], prompts=PICTURES),
    }
    return json.loads(server.run(prompt)["outputs"]["6"]["text"][0])


def test_presets_and_sums_report_every_term(server, weights):
    plain = scored(server)
    assert scored(server, formula="clip+clipiqa")["scores"] == plain["scores"]
    found = scored(server, formula="aq+hps", hps_name="tiny_hps.safetensors")
    terms = found["scores"]["terms"]
    assert found["preset"] == "aq+hps" and set(terms) == {"aq", "hps"}
    assert found["scores"]["jaq"] == pytest.approx(
        [a + 2 * q for a, q in zip(terms["aq"], terms["hps"], strict=True)]
    )
    summed = scored(server, formula="clip + 0.5*clip_iqa", quality_weight=9.0)["scores"]
    assert summed["jaq"] == pytest.approx(
        [a + 0.5 * q for a, q in zip(
            plain["scores"]["alignment"], plain["scores"]["terms"]["clip_iqa"], strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"formula": "clip + beauty"}, "'beauty' is unknown"),
        ({"formula": "aq+hps"}, "choose hps_name"),
        ({"formula": "aq+hps", "hps_name": "gone.pt"}, "hps_name: 'gone.pt' not in"),
        ({"formula": "aq+hps", "hps_name": "narrow.pth"}, "is no CLIP model"),
        (
            {"formula": "clip + aesthetic", "aesthetic_name": "narrow.pth"},
            "reads features 3 wide",
        ),
    ],
)
def test_an_objective_that_can_not_be_is_named(server, weights, change, says):
    with pytest.raises(ServerError, match=says):
        scored(server, **change)


def test_the_control_tells_whether_it_repairs(server):
    """At another cfg than 1, with the unquantized model beside the quantized one."""
    prompt = graph(budget=4, search="gp")
    prompt["7"] = node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors")
    prompt["4"]["inputs"] |= {"cfg": 1.5, "negative": "blurry", "reference_model": ["7", 0]}
    report = report_of(server.run(prompt))
    found = report["precheck"]
    assert found["prompts"] == 4 and len(found["steps"]) == 2
    assert 0 < found["error"][1] < 1 and found["total"] < 1
    assert "pre-check: the best correction of a step" in report["report"]
    held_out = 2 * (6 + 6 + 6 if report["control"] else 6 + 6)
    trials = 4 + 5 * 4  # cfg has no part in the count: a latent is guided once
    assert report["nfe"] <= trials + held_out + found["nfe"]
    if report["control"] is None:  # nothing beat c = 1 in four trials
        assert report["best"]["c_x"] == [1.0, 1.0]
    else:
        assert report["control"]["text"] in report["report"]
        assert report["control"]["lost"]["n"] == len(HELDOUT)
    provenance = json.loads(report["schedule"])["provenance"]
    assert provenance["precheck"] == found
    prompt["4"]["inputs"]["guard"] = True  # other inputs, so that the node runs again
    again = report_of(server.run(prompt))
    assert again["new_trials"] == 0 and again["precheck"] == found


def test_a_reference_of_another_kind_is_refused(server):
    prompt = graph(budget=4, search="gp")
    prompt["7"] = node("ModelSamplingSD3", model=["1", 0], shift=1.0)
    prompt["4"]["inputs"]["reference_model"] = ["7", 0]
    with pytest.raises(ServerError, match="the reference model has other noise levels"):
        server.run(prompt)


def prompts_seen(server, **inputs) -> list[str]:
    """The held-out prompts of a Calibration Prompts node, as JAQ Evaluate reports them."""
    prompt = graph()
    prompt["2"] = node("QSchedCalibrationPrompts", **inputs)
    del prompt["4"]
    prompt["5"] = node("QSchedEvaluate", **trajectory())
    return json.loads(server.run(prompt)["outputs"]["5"]["text"][0])["prompts"]


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_prompts_come_from_a_file_in_the_input_folder(server, kind):
    path = server.base / "input" / f"mine.{kind}"
    if kind == "json":
        content = json.dumps({"calibration": CALIBRATION, "heldout": HELDOUT[:2]})
    else:
        content = "\n".join([*CALIBRATION, "[heldout]", *HELDOUT[:2]])
    path.write_text(content, encoding="utf-8")
    given = {"source": "file", "calibration": "", "heldout": "", "seed": 1, "file": path.name}
    assert prompts_seen(server, **given) == HELDOUT[:2]


def sets(server) -> list[str]:
    node = server.object_info()["QSchedCalibrationPrompts"]
    options = node["input"]["required"]["source"][1]["options"]
    return [name for name in options if name.startswith("set: ")]


def test_a_users_own_sets_are_listed_by_name(server):
    folder = server.base / "models" / "qsched_prompts"
    (folder / "birds").mkdir(parents=True)
    (folder / "mine.txt").write_text("\n".join([*CALIBRATION, "[heldout]", HELDOUT[0]]))
    content = json.dumps({"calibration": CALIBRATION, "heldout": HELDOUT[:2]})
    (folder / "birds" / "small.json").write_text(content)
    (folder / "no-border.txt").write_text("a robin\na wren\n")
    (folder / "notes.md").write_text("not prompts")
    listed = [name.replace("\\", "/") for name in sets(server)]
    assert listed == ["set: birds/small.json", "set: mine.txt", "set: no-border.txt"]
    given = {"calibration": "", "heldout": "", "seed": 1}
    assert prompts_seen(server, source="set: mine.txt", **given) == HELDOUT[:1]
    assert prompts_seen(server, source=sets(server)[0], **given) == HELDOUT[:2]
    with pytest.raises(ServerError, match=r"no-border.txt has no line \[heldout\]"):
        prompts_seen(server, source="set: no-border.txt", **given)
    (folder / "mine.txt").write_text("\n".join([*CALIBRATION, "[heldout]", HELDOUT[3]]))
    assert prompts_seen(server, source="set: mine.txt", **given) == [HELDOUT[3]]
    shutil.rmtree(folder)
    assert sets(server) == []


@pytest.mark.parametrize(
    "name", ["../qsched/x.json", "/etc/passwd.txt", "no.txt", "mine.md", "a\0.txt"]
)
def test_a_set_that_is_not_there_is_refused_wired_or_not(server, name):
    """A wired name is judged when the node runs."""
    prompt = graph()
    prompt["2"]["inputs"]["source"] = f"set: {name}"
    with pytest.raises(ServerError, match="source"):
        server.run(prompt)
    outside = server.base / "models" / "qsched" / "x.json"
    outside.parent.mkdir(parents=True, exist_ok=True)
    outside.write_text(json.dumps({"calibration": ["a"], "heldout": ["b"]}))
    prompt["9"] = node("PrimitiveString", value=f"set: {name}")
    prompt["2"]["inputs"]["source"] = ["9", 0]
    with pytest.raises(ServerError, match="source"):
        server.run(prompt)
    outside.unlink()


def test_prompts_come_as_a_list_of_strings(server):
    given = {
        "source": "text", "calibration": json.dumps(CALIBRATION),
        "heldout": json.dumps(HELDOUT[:3]), "seed": 1,
    }  # fmt: skip
    assert prompts_seen(server, **given) == HELDOUT[:3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": "file", "file": "../secret.json"}, "is no file in ComfyUI's input folder"),
        ({"source": "file", "file": ""}, "is no file"),
        ({"source": "bundled", "categories": "people, weather"}, "'weather', which is not one"),
    ],
)
def test_prompts_that_are_not_there_are_named(server, change, says):
    prompt = graph()
    prompt["2"]["inputs"] |= change
    with pytest.raises(ServerError, match=says):
        server.run(prompt)
