"""The shipped workflows: both forms are the same graph, and the graph runs to a picture."""

from __future__ import annotations

import asyncio
import io
import json
import re

import aiohttp
import pytest
from PIL import Image

from devtools.server import ServerError

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NAME = "qsched_learn_and_sample.json"


@pytest.fixture
def workflow(repo_root):
    return json.loads((repo_root / "workflows" / "api" / NAME).read_text(encoding="utf-8"))


@pytest.fixture
def short(workflow):
    """The shipped graph with few prompts and a small budget; ``short(seed)`` is a study of its own."""

    def make(seed: int, **calibrator) -> dict:
        graph = json.loads(json.dumps(workflow))
        for key, count in (("calibration", 4), ("heldout", 8)):
            lines = graph["2"]["inputs"][key].splitlines()
            graph["2"]["inputs"][key] = "\n".join(lines[:count])
        graph["2"]["inputs"]["seed"] = seed
        graph["4"]["inputs"] |= {"search": "gp", "budget": 6} | calibrator
        graph["5"]["inputs"]["name"] = f"short-{seed}"
        return graph

    return make


def as_api(workflow: dict, info: dict) -> dict:
    """A UI workflow in API form, as the page converts it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        schema, values, inputs = info[node["type"]], iter(node["widgets_values"]), {}
        for group in ("required", "optional"):
            for name in schema["input_order"].get(group, []):
                kind, *options = schema["input"][group][name]
                if isinstance(kind, list) or kind in WIDGETS:
                    inputs[name] = next(values)
                    controlled = options and options[0].get("control_after_generate")
                    if controlled or name in ("seed", "noise_seed"):
                        next(values)  # the page's own "control after generate" widget
        assert next(values, None) is None, f"{node['type']} has more widget values than widgets"
        for socket in node["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = links[socket["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def test_template_and_api_file_are_the_same_graph(server, repo_root, workflow):
    template = json.loads((repo_root / "workflows" / NAME).read_text(encoding="utf-8"))
    converted = as_api(template, server.object_info())
    assert converted.keys() == workflow.keys()
    for key, node in workflow.items():
        assert converted[key]["class_type"] == node["class_type"]
        given = node["inputs"]
        assert {k: converted[key]["inputs"][k] for k in given} == given
        extra = set(converted[key]["inputs"]) - set(given)
        defaults = server.object_info()[node["class_type"]]["input"].get("optional", {})
        assert extra <= set(defaults)


def test_every_template_has_a_thumbnail(repo_root):
    templates = list((repo_root / "workflows").glob("*.json"))
    assert templates
    for template in templates:
        assert Image.open(template.with_suffix(".jpg")).width >= 200


def test_the_workflow_learns_saves_and_samples(server, short):
    entry = server.run(short(101), timeout=600)
    picture = Image.open(io.BytesIO(server.image(entry["outputs"]["11"]["images"][0])))
    assert picture.size == (96, 96)
    assert len(picture.convert("RGB").getcolors(96 * 96)) > 50
    report = json.loads(entry["outputs"]["4"]["text"][0])
    assert len(report["trials"]) == 7  # c = 1 and the budget
    assert report["heldout"]["before"].keys() == report["heldout"]["after"].keys()
    # 4 prompts: the first step once, then 3 steps for each of 7 candidates; held-out on top
    assert report["nfe"] >= 4 + 7 * 4 * 3
    saved = json.loads((server.base / "models" / "qsched" / "short-101.json").read_text())
    assert saved["correction"] == json.loads(report["schedule"])["correction"]
    assert saved["provenance"]["model"]["format"] == "int2"


def test_a_finished_study_is_not_repeated(server, short):
    first = json.loads(server.run(short(102), 600)["outputs"]["4"]["text"][0])
    again = short(102)
    again["4"]["inputs"]["guard"] = False  # another prompt to ComfyUI, the same study
    second = json.loads(server.run(again, 600)["outputs"]["4"]["text"][0])
    assert first["new_trials"] == 7
    assert second["new_trials"] == 0
    assert [t["jaq"] for t in second["trials"]] == [t["jaq"] for t in first["trials"]]


def test_progress_and_text_arrive_on_the_websocket(server, short):
    async def follow() -> tuple[list[int], list[str]]:
        steps, texts = [], []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId=follower") as socket,
        ):
            prompt_id = server.queue(short(103), client_id="follower")
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    texts.append(message.data[4:].decode("utf-8", "replace"))
                    continue
                event = json.loads(message.data)
                if event["type"] == "progress" and event["data"]["node"] == "4":
                    steps.append(event["data"]["value"])
                if event["type"] == "execution_error":
                    pytest.fail(event["data"]["exception_message"])
                if event["type"] == "execution_success":
                    assert event["data"]["prompt_id"] == prompt_id
                    return steps, texts
        raise AssertionError("the socket closed early")

    steps, texts = asyncio.run(asyncio.wait_for(follow(), 600))
    assert steps == sorted(steps)
    assert steps[-1] == 7
    assert any(re.search(r"trial \d of 7, best JAQ", text) for text in texts)


@pytest.mark.parametrize(
    ("node", "name", "value", "named"),
    [
        ("1", "layers", "mlp=nf5", "nf5"),
        ("1", "weight_format", "int5", "weight_format"),
        ("2", "calibration", "# nothing\n", "calibration"),
        ("3", "quality", "clip-iqa", "clip-iqa"),
        ("4", "steps", 0, "steps"),
        ("4", "solver", "heun", "solver"),
        ("5", "name", "../outside", "../outside"),
        ("9", "denoise", 0.0, "denoise"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(server, short, node, name, value, named):
    graph = short(104)
    graph[node]["inputs"][name] = value
    assert named in refused(server, graph)[node]


def refused(server, graph: dict) -> dict[str, str]:
    """What ComfyUI has against a prompt, by node; parts of the graph that are fine don't run."""
    try:
        answer = json.loads(server.request("/prompt", {"prompt": graph}))
    except ServerError as error:
        return {n: str(error) for n in re.findall(r"^node (\w+)", str(error), re.MULTILINE)}
    server.request("/queue", {"delete": [answer["prompt_id"]]})
    server.interrupt()
    return {n: json.dumps(found["errors"]) for n, found in answer["node_errors"].items()}
