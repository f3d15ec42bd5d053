"""What the tests do in ComfyUI's page."""

from __future__ import annotations

import json
from urllib.parse import quote

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
