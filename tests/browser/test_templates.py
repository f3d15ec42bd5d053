"""Every template in a real page: it opens whole in both canvases, and runs with tiny models."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from standins import CANVASES, NO_T5

from demo.templates import FOLDER, TEMPLATES
from devtools.server import PACK_NAME

NAMES = [template.name for template in TEMPLATES]
OPEN = """async ([url, name]) => {
    const workflow = await (await fetch(url)).json()
    await window.app.loadGraphData(workflow, true, true, name)
    return (await window.app.graphToPrompt()).output
}"""
# What is asked of a tiny model: small pictures, few prompts.
SHRINK = """([size, few, types]) => {
    const set = (node, name, value) => {
        const widget = node.widgets?.find((w) => w.name === name)
        if (widget) widget.value = value
    }
    for (const node of window.app.graph.nodes) {
        const smaller = node.title === 'Paint anew' ? size / 2 : size
        for (const name of ['width', 'height']) set(node, name, smaller)
        for (const name of ['x', 'y']) set(node, name, size / 4)
        if (node.type === 'QSchedCalibrationPrompts')
            for (const [name, value] of Object.entries(few)) set(node, name, value)
        if (node.type === 'QSchedJAQObjective')
            set(node, 'clip_name', 'qsched_demo_scorer.safetensors')
        if (node.type === 'QSchedJAQCalibrator') {
            set(node, 'budget', 6)
            set(node, 'guard', false)
        }
        if (node.type === 'DualCLIPLoader') {
            const type = node.widgets.find((w) => w.name === 'type')
            type.value = types[type.value] ?? type.value
        }
    }
}"""
# Each node's box: [left, top, right, bottom], in the page's or the graph's units.
BOXES = """(vue) => window.app.graph.nodes.map((node) => {
    if (!vue) {
        const [x, y, w, h] = node.getBounding()
        return [node.title, x, y, x + w, y + h]
    }
    const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    return box && [node.title, box.left, box.top, box.right, box.bottom]
})"""
DRAWN = """(count) => document.querySelectorAll('[data-node-id]').length >= count"""


def opened(page, name: str) -> dict:
    url = f"/api/workflow_templates/{quote(PACK_NAME)}/{quote(name)}.json"
    return page.evaluate(OPEN, [url, name])


def overlapping(boxes) -> list[tuple[str, str]]:
    found = []
    for i, (one, left, top, right, bottom) in enumerate(boxes):
        for other, l2, t2, r2, b2 in boxes[i + 1 :]:
            if min(right, r2) - max(left, l2) > 1 and min(bottom, b2) - max(top, t2) > 1:
                found.append((one, other))
    return found


def boxes_of(page, canvas: str) -> list:
    vue = canvas != "classic"
    if vue:
        page.wait_for_function(DRAWN, arg=page.evaluate("window.app.graph.nodes.length"))
    boxes = page.evaluate(BOXES, vue)
    assert None not in boxes
    return boxes


def queued(page) -> str:
    """The id of the prompt that the page's Run button posts."""
    with page.expect_response(lambda answer: answer.url.endswith("/prompt")) as posted:
        page.evaluate("window.app.queuePrompt(0, 1)")
    answer = posted.value.json()
    assert "prompt_id" in answer and not answer["node_errors"], json.dumps(answer)[:2000]
    return answer["prompt_id"]


def test_the_browser_of_templates_has_them_all(server, repo_root):
    found = server.get("/api/workflow_templates")[PACK_NAME]
    assert set(NAMES) <= set(found)
    for name in NAMES:
        picture = server.request(f"/api/workflow_templates/{quote(PACK_NAME)}/{quote(name)}.jpg")
        assert picture[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)  # the second finds the first's work
@pytest.mark.parametrize("name", NAMES)
def test_it_opens_as_its_twin_without_overlap_and_runs(server, page, canvas, name):
    page.faults.clear()
    found = opened(page, name)
    twin = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert found.keys() == twin.keys()
    for key, node in twin.items():
        assert found[key]["class_type"] == node["class_type"]
        shown = {n: found[key]["inputs"].get(n) for n in node["inputs"]}
        assert shown == node["inputs"], node["class_type"]
    assert overlapping(boxes_of(page, canvas)) == []
    few = {
        "source": "text",
        "calibration": "a red ring\na blue cross",
        "heldout": "a green square\na white circle",
    }
    page.evaluate(SHRINK, [96, few, NO_T5])
    server.wait(queued(page), 240)
    assert overlapping(boxes_of(page, canvas)) == []
    assert page.faults == []
