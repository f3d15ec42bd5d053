"""Every template in a real page: it opens whole in both canvases, and runs with tiny models."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from pages import few_prompts, opened, queued
from standins import CANVASES

from demo.templates import FOLDER, TEMPLATES
from devtools.server import PACK_NAME

NAMES = [template.name for template in TEMPLATES]
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


def test_the_browser_of_templates_has_them_all(server, repo_root):
    found = server.get("/api/workflow_templates")[PACK_NAME]
    assert set(NAMES) == set(found)
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
    few_prompts(page)
    server.wait(queued(page), 240)
    assert overlapping(boxes_of(page, canvas)) == []
    assert page.faults == []
