"""A schedule from the calibration to the picture that carries it, and its file."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from PIL import Image

from demo.graphs import shipped

PROMPTS = {
    "calibration": "a red ring on a white background\na blue cross on a black background",
    "heldout": "a green square on a white background\na white circle on a blue background",
}


@pytest.fixture(scope="module")
def learned(server) -> tuple[dict, bytes]:
    """The shipped graph, short, run once under the file's own name: history entry and picture."""
    graph = shipped()
    graph["2"]["inputs"] |= PROMPTS | {"seed": 2024}
    graph["4"]["inputs"] |= {"search": "grid", "budget": 100, "guard": False, "preset": "quick"}
    graph["5"]["inputs"] |= {"name": "{model}-{format}-{solver}-{steps}", "overwrite": False}
    entry = server.run(graph, 600)
    (made,) = entry["outputs"]["11"]["images"]
    return entry, server.image(made)


def test_a_preset_takes_the_place_of_search_and_budget(learned):
    content = json.loads(learned[0]["outputs"]["4"]["text"][0])
    assert len(content["trials"]) == 1 + 12


def test_the_widget_that_carries_it_is_where_the_workflow_is_written(server, repo_root):
    text = (repo_root / "nodes" / "host" / "remember.py").read_text(encoding="utf-8")
    after = int(re.search(r"^AFTER = (\d+)", text, re.MULTILINE)[1])
    node = server.object_info()["QSchedJAQCalibrator"]
    kinds = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
    names = [n for n in node["input_order"]["optional"] if node["input"]["optional"][n][0] in kinds]
    assert names[-1 - after] == "learned"


def shows(server) -> list[str]:
    node = server.object_info()["QSchedLoadSchedule"]
    return node["input"]["required"]["schedule_name"][1]["options"]


def test_its_file_is_named_after_what_it_is_for_and_is_listed(server, learned):
    assert "qsched_demo-int2-euler-4.json" in shows(server)


def test_a_picture_carries_it_and_is_made_again_without_learning(server, learned):
    """The search's records are not needed either."""
    _, picture = learned
    prompt = json.loads(Image.open(io.BytesIO(picture)).info["prompt"])
    assert json.loads(prompt["4"]["inputs"]["learned"])["schedule"]["format"] == "qsched"
    shutil.rmtree(server.base / "user" / "qsched" / "studies")
    again = server.run(prompt, 60)
    content = json.loads(again["outputs"]["4"]["text"][0])
    assert content["new_trials"] == 0
    assert "learned before" in content["report"]
    (made,) = again["outputs"]["11"]["images"]
    one, two = (Image.open(io.BytesIO(p)).convert("RGB") for p in (picture, server.image(made)))
    assert one.tobytes() == two.tobytes()
    assert not list((server.base / "user" / "qsched").glob("studies/*.journal"))


def saving(name: str, start: float, overwrite: bool = False) -> dict:
    checkpoint = {"ckpt_name": "qsched_demo.safetensors"}
    ramp = {"solver": "euler", "scheduler": "simple", "steps": 3, "x_start": start, "x_end": 1.0,
            "eps_start": 1.0, "eps_end": 1.0, "model": ["1", 0]}  # fmt: skip
    save = {"schedule": ["2", 0], "name": name, "overwrite": overwrite}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": checkpoint},
        "2": {"class_type": "QSchedRamp", "inputs": ramp},
        "3": {"class_type": "QSchedSaveSchedule", "inputs": save},
    }


def test_a_filled_in_name_never_replaces_anothers(server):
    folder, name = server.base / "models" / "qsched", "life/{model}-{solver}-{steps}"
    for start in (1.1, 1.2, 1.1):
        server.run(saving(name, start), 60)
    files = sorted(path.name for path in (folder / "life").iterdir())
    assert files == ["any-euler-3-2.json", "any-euler-3.json"]
    before = (folder / "life" / "any-euler-3-2.json").read_text(encoding="utf-8")
    server.run(saving(name, 1.3, overwrite=True), 60)
    assert sorted(path.name for path in (folder / "life").iterdir()) == files
    assert (folder / "life" / "any-euler-3-2.json").read_text(encoding="utf-8") == before
    assert "1.3" in (folder / "life" / "any-euler-3.json").read_text(encoding="utf-8")


def test_an_unknown_part_of_a_name_is_refused_at_once(server):
    with pytest.raises(Exception, match=r"has a part that is not known"):
        server.queue(saving("{seed}", 1.1))
