"""What the tests do in ComfyUI's page."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from hostpath import ROOT
from standins import NO_T5

from devtools.server import PACK_NAME

FETCH = "async ([url]) => (await fetch(url)).json()"
OPEN = """async ([workflow, name]) => {
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
            set(node, 'budget', 'number')
            set(node, 'budget.number', 6)
            set(node, 'guard', false)
        }
        if (node.type === 'DualCLIPLoader') {
            const type = node.widgets.find((w) => w.name === 'type')
            type.value = types[type.value] ?? type.value
        }
    }
}"""


def opened(page, name: str) -> dict:
    """The template ``name`` in the page; the graph that would be queued."""
    url = f"/api/workflow_templates/{quote(PACK_NAME)}/{quote(name)}.json"
    return opened_file(page, page.evaluate(FETCH, [url]), name)


def opened_file(page, workflow: dict, name: str) -> dict:
    """A workflow in the page; the graph that would be queued."""
    return page.evaluate(OPEN, [workflow, name])


def opened_demo(page) -> dict:
    """The demo's workflow in the page; the graph that would be queued."""
    path = ROOT / "demo" / "workflow" / "qsched_learn_and_sample.json"
    return opened_file(page, json.loads(path.read_text(encoding="utf-8")), path.stem)


def few_prompts(page) -> None:
    """Small pictures, few prompts, few candidates."""
    few = {
        "source": "text",
        "calibration": "a red ring\na blue cross",
        "heldout": "a green square\na white circle",
    }
    page.evaluate(SHRINK, [96, few, NO_T5])


def queued(page) -> str:
    """The id of the prompt that the page's Run button posts."""
    with page.expect_response(lambda answer: answer.url.endswith("/prompt")) as posted:
        page.evaluate("window.app.queuePrompt(0, 1)")
    answer = posted.value.json()
    assert "prompt_id" in answer and not answer["node_errors"], json.dumps(answer)[:2000]
    return answer["prompt_id"]


SHOW = """async ([id]) => {
    const node = window.app.graph.getNodeById(id), {ds} = window.app.canvas
    const [x, y, wide, tall] = node.getBounding()
    ds.scale = Math.min(1, 800 / tall)
    ds.offset[0] = 150 / ds.scale - x
    ds.offset[1] = 120 / ds.scale - y
    window.app.canvas.draw(true, true)
    for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame)
    return [150, 120, wide * ds.scale, tall * ds.scale]
}"""


def photographed(page, node_id, canvas: str, path: Path) -> None:
    """A picture of one node as it is drawn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left, top, wide, tall = page.evaluate(SHOW, [node_id])
    if canvas != "classic":
        page.locator(f'[data-node-id="{node_id}"]').screenshot(path=path)
        return
    clip = {"x": left - 8, "y": top - 8, "width": wide + 16, "height": tall + 16}
    page.screenshot(path=path, clip=clip)
