"""The shipped workflow: its graph runs to a picture."""

from __future__ import annotations

import asyncio
import io
import json
import re
import urllib.error
import urllib.request
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
from PIL import Image

from devtools.server import ServerError

TEXT, PREVIEW = 3, 4  # kinds of binary messages that the server sends
NAME = "qsched_learn_and_sample.json"


@pytest.fixture(scope="module")
def workflow(repo_root):
    return json.loads((repo_root / "demo" / "workflow" / "api" / NAME).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
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


def test_every_template_has_a_thumbnail(repo_root):
    templates = list((repo_root / "workflows").glob("*.json"))
    assert templates
    for template in templates:
        assert Image.open(template.with_suffix(".jpg")).width >= 200


async def follow(server, prompt: dict) -> tuple[str, list[float], list[str], list[bytes]]:
    """A prompt's id, and what its client hears: progress and previews of node 4, all texts."""
    steps, texts, previews = [], [], []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws?clientId=follower") as socket,
    ):
        flags = {"supports_preview_metadata": True}  # as the page says of itself
        await socket.send_json({"type": "feature_flags", "data": flags})
        prompt_id = await asyncio.to_thread(server.queue, prompt, client_id="follower")
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                kind, body = int.from_bytes(message.data[:4], "big"), message.data[4:]
                length = int.from_bytes(body[:4], "big")
                if kind == TEXT:
                    texts.append(body.decode("utf-8", "replace"))
                elif kind == PREVIEW and json.loads(body[4 : 4 + length])["display_node_id"] == "4":
                    previews.append(body[4 + length :])
                continue
            event = json.loads(message.data)
            if event["type"] == "progress" and event["data"]["node"] == "4":
                steps.append(event["data"]["value"] / event["data"]["max"])
            if event["type"] == "execution_error":
                pytest.fail(event["data"]["exception_message"])
            if event["type"] == "execution_success":
                assert event["data"]["prompt_id"] == prompt_id
                return prompt_id, steps, texts, previews
    raise AssertionError("the socket closed early")


@pytest.fixture(scope="module")
def learned(server, short) -> SimpleNamespace:
    """The short workflow run once, with a client that listens: history entry and what it heard."""
    heard = asyncio.run(asyncio.wait_for(follow(server, short(101)), 600))
    prompt_id, steps, texts, previews = heard
    entry = server.wait(prompt_id, 60)
    report = json.loads(entry["outputs"]["4"]["text"][0])
    return SimpleNamespace(entry=entry, report=report, steps=steps, texts=texts, previews=previews)


def test_the_workflow_learns_saves_and_samples(server, learned):
    (made,) = learned.entry["outputs"]["11"]["images"]
    picture = Image.open(io.BytesIO(server.image(made))).convert("RGB")
    assert picture.size == (96, 96)
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=float) / 255, -1, 0)
    # "a large red ring in the center of a white background", by a model of two bits
    assert 0.05 < ((red - green > 0.2) & (red - blue > 0.2)).mean() < 0.6
    assert (np.minimum(np.minimum(red, green), blue) > 0.7).mean() > 0.3
    report = learned.report
    assert report["new_trials"] == len(report["trials"]) == 7  # c = 1 and the budget
    assert report["heldout"]["before"].keys() == report["heldout"]["after"].keys()
    # 4 prompts: the first step once, then 3 steps for each of 7 candidates; held-out on top
    assert report["nfe"] >= 4 + 7 * 4 * 3
    saved = json.loads((server.base / "models" / "qsched" / "short-101.json").read_text())
    assert saved["correction"] == json.loads(report["schedule"])["correction"]
    assert saved["provenance"]["model"]["format"] == "int2"


def test_a_finished_study_is_not_repeated(server, short, learned):
    again = short(101, guard=False)  # another prompt to ComfyUI, the same study
    again["5"]["inputs"]["name"] = "short-again"
    second = json.loads(server.run(again, 600)["outputs"]["4"]["text"][0])
    assert second["new_trials"] == 0
    assert [t["jaq"] for t in second["trials"]] == [t["jaq"] for t in learned.report["trials"]]


def test_progress_and_text_arrive_on_the_websocket(learned):
    assert learned.steps == sorted(learned.steps)
    assert learned.steps[-1] == 1
    for said in (
        r"search: trial \d of 7, best JAQ", "check on held-out prompts", "Warning: 4 calibration",
        "Warning: 8 held-out", "saved to",
    ):  # fmt: skip
        assert any(re.search(said, text) for text in learned.texts), said


def test_the_report_is_the_last_picture_that_the_page_gets(server, learned):
    """The page keeps the last preview in front of the node's output."""
    (shown,) = learned.entry["outputs"]["4"]["images"]
    report = Image.open(io.BytesIO(server.image(shown))).convert("RGB")
    last = Image.open(io.BytesIO(learned.previews[-1])).convert("RGB")
    assert last.tobytes() == report.tobytes()


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        ("1", "layers", "mlp=nf5"),
        ("1", "weight_format", "int5"),
        ("3", "quality", "clip-iqa"),
        ("4", "steps", 0),
        ("4", "solver", "heun"),
        ("4", "storage", "postgresql://host/db"),
        ("5", "name", "../outside"),
        ("9", "denoise", 0.0),
    ],
)
def test_one_mistake_is_one_error_on_its_input_before_anything_runs(
    server, short, node, name, value
):
    graph = short(104)
    graph[node]["inputs"][name] = value
    (error,) = refused(server, graph)[node]
    assert error["extra_info"]["input_name"] == name
    said = f"{error['message']} {error['details']}"
    assert name in said or str(value) in said, said


@pytest.mark.parametrize(
    ("node", "change", "said"),
    [
        ("2", {"calibration": "# nothing\n"}, "calibration has no prompts"),
        ("4", {"eta": 0.5}, "eta=0.5"),
        ("1", {"layers": "nowhere=nf4"}, "layers: 'nowhere' matches none"),
        ("3", {"formula": "clip + 2*hps"}, "choose hps_name"),
    ],
)
def test_what_takes_several_inputs_to_tell_is_told_by_the_node_when_it_runs(
    server, short, node, change, said
):
    graph = short(104)
    graph[node]["inputs"] |= change
    with pytest.raises(ServerError, match=rf"node {node} \(\w+\): .*{re.escape(said)}"):
        server.run(graph, 120)


def refused(server, graph: dict) -> dict[str, list[dict]]:
    """ComfyUI's errors for a prompt, by node; parts of the graph that are fine don't run."""
    body = json.dumps({"prompt": graph}).encode()
    request = urllib.request.Request(
        f"{server.url}/prompt", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        content = json.loads(error.read())
    if "prompt_id" in content:
        server.request("/queue", {"delete": [content["prompt_id"]]})
        server.interrupt()
    return {node: found["errors"] for node, found in content["node_errors"].items()}
