"""Every node of the pack, drawn in both canvases: whole, with its defaults, and kept as a picture."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pages import photographed
from PIL import Image
from standins import CANVASES

KINDS = """() => Object.keys(window.LiteGraph.registered_node_types)
    .filter((kind) => kind.startsWith('QSched')).sort()"""
EMPTY = """async () => {
    const empty = {last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {},
        extra: {}, version: 0.4, id: crypto.randomUUID()}
    await window.app.loadGraphData(empty)
}"""
ADD = """([kind, before]) => {
    const {graph} = window.app
    if (before !== null) graph.remove(graph.getNodeById(before))
    const node = window.LiteGraph.createNode(kind)
    graph.add(node)
    return [node.id, node.widgets?.map((w) => [w.name, w.value]) ?? []]
}"""
# Each widget's name, top and bottom, and the node's own bottom; null until all are drawn.
DRAWN = {
    "classic": """([id]) => {
        const node = window.app.graph.getNodeById(id)
        const widgets = (node.widgets ?? []).filter((w) => !w.hidden)
        const boxes = widgets.filter((w) => w.element).map((w) => w.element.getBoundingClientRect())
        if (widgets.some((w) => w.last_y === undefined) || boxes.some((b) => !b.height)) return null
        const rows = widgets.map((w) => [w.name, w.last_y, w.last_y + (w.computedHeight ?? 20)])
        return {rows, bottom: node.size[1]}
    }""",
    "nodes 2.0": """([id]) => {
        const box = document.querySelector(`[data-node-id="${id}"]`)
        if (!box) return null
        const rows = [...box.querySelectorAll('[data-testid="node-widget"]')]
            .map((row) => [row.innerText, row.getBoundingClientRect()])
            .map(([name, {top, bottom}]) => [name, top, bottom])
        return {rows, bottom: box.getBoundingClientRect().bottom}
    }""",
}


def defaults(node: dict) -> dict:
    """What a new node's widgets hold, as its schema says."""
    inputs = {name: spec for group in node["input"].values() for name, spec in group.items()}
    return {
        name: spec[1]["default"]
        for name, spec in inputs.items()
        if len(spec) > 1 and isinstance(spec[1], dict) and "default" in spec[1]
    }


def problems(rows: list, bottom: float) -> list[str]:
    found = [f"{name} ends below its node" for name, _, end in rows if end > bottom + 1]
    ordered = sorted(rows, key=lambda row: row[1])
    for (one, _, end), (other, start, _) in pairwise(ordered):
        if end > start + 1:
            found.append(f"{one} overlaps {other}")
    return found


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_every_node_is_drawn_whole_with_its_defaults(server, page, canvas, screenshots):
    page.faults.clear()
    page.evaluate(EMPTY)
    info, found, before = server.object_info(), {}, None
    kinds = page.evaluate(KINDS)
    assert len(kinds) == sum(name.startswith("QSched") for name in info)
    for kind in kinds:
        before, values = page.evaluate(ADD, [kind, before])
        drawn = page.wait_for_function(DRAWN[canvas], arg=[before]).json_value()
        path = screenshots / "nodes" / canvas / f"{kind}.png"
        photographed(page, before, canvas, path)
        wrong = problems(drawn["rows"], drawn["bottom"])
        wanted = defaults(info[kind])
        wrong += [
            f"{name} is {value!r}, not {wanted[name]!r}"
            for name, value in values
            if name in wanted and value != wanted[name]
        ]
        with Image.open(path) as picture:
            low, high = picture.convert("L").getextrema()
        if high - low < 100:
            wrong.append("nothing can be read on it")
        if wrong:
            found[kind] = wrong
    assert found == {}
    assert page.faults == []
