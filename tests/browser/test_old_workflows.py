"""A workflow that a page of version 0.1.0 saved: its numbers that stood for a word, and the others."""

from __future__ import annotations

import json

import pytest
from hostpath import ROOT
from pages import opened_file
from standins import CANVASES

SAVED = ROOT / "tests" / "golden" / "workflows"
SET = """async ([title, values]) => {
    const node = window.app.graph.nodes.find((n) => n.title === title)
    for (const [name, value] of values)
        node.widgets.find((w) => w.name === name).value = value
    return (await window.app.graphToPrompt()).output[node.id].inputs
}"""
SAVE = "() => window.app.graph.serialize()"
# An empty workflow of its own: the page remembers values by the ids of workflow and node.
ADD = """async ([kind]) => {
    const empty = {last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {},
        extra: {}, version: 0.4, id: crypto.randomUUID()}
    await window.app.loadGraphData(empty)
    const node = window.LiteGraph.createNode(kind)
    node.title = 'it'
    window.app.graph.add(node)
    return node.widgets.map((w) => [w.name, w.value])
}"""


def read(name: str) -> dict:
    return json.loads((SAVED / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_it_is_queued_as_it_was(page, canvas):
    """What it queued then; a new input may be added."""
    page.faults.clear()
    found, before = (
        opened_file(page, read("numbers-for-words"), "before"),
        read("numbers-for-words-api"),
    )
    assert found.keys() == before.keys()
    for key, node in before.items():
        assert found[key]["class_type"] == node["class_type"]
        shown = {name: found[key]["inputs"].get(name) for name in node["inputs"]}
        assert shown == node["inputs"], node["class_type"]
    again = opened_file(page, page.evaluate(SAVE), "again")
    assert again == found
    assert page.faults == []


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_a_word_or_a_number_is_chosen_in_the_page(page, canvas):
    page.faults.clear()
    new = dict(page.evaluate(ADD, ["QSchedKSampler"]))
    assert new["eta"] == new["gamma"] == "solver's own"
    assert "eta.number" not in new
    chosen = page.evaluate(SET, ["it", [["eta", "number"], ["eta.number", 0.3]]])
    assert (chosen["eta"], chosen["eta.number"], chosen["gamma"]) == ("number", 0.3, "solver's own")
    saved = page.evaluate(SAVE)
    (found,) = opened_file(page, saved, "saved").values()
    assert found["inputs"] == chosen
    back = page.evaluate(SET, ["it", [["eta", "solver's own"]]])
    assert back["eta"] == "solver's own" and "eta.number" not in back
    step = dict(page.evaluate(ADD, ["QSchedEditSchedule"]))
    assert (step["step"], step["step.number"]) == ("one step", 1)
    assert page.faults == []
