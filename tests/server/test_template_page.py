"""The demo's workflow in a real page: it opens without an error, and is the graph of its API twin."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator

import pytest

NAME = "qsched_learn_and_sample.json"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
READY = """() => window.app?.graph && window.LiteGraph?.registered_node_types
    && 'QSchedJAQCalibrator' in window.LiteGraph.registered_node_types"""
# While the page starts, it opens a workflow of its own, which may come after ours.
OPENED = """async (workflow) => {
    if (window.app.graph.nodes?.length !== workflow.nodes.length)
        await window.app.loadGraphData(workflow)
    const {output} = await window.app.graphToPrompt()
    return Object.keys(output).length ? output : null
}"""


@pytest.fixture(scope="module")
def page(server) -> Iterator:
    """ComfyUI's page in a headless Chromium, with every node of the pack known."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with playwright.sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=browser, args=[*FLAGS])
        opened = running.new_page()
        opened.faults = []
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.goto(server.url)
        opened.wait_for_function(READY, timeout=120_000)
        yield opened
        running.close()


def test_the_demos_workflow_opens_as_its_api_twin(page, server, repo_root):
    """What the page would queue is what the API file queues; what it adds are optional inputs."""
    folder = repo_root / "demo" / "workflow"
    files = (folder / NAME, folder / "api" / NAME)
    template, twin = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    deadline = time.monotonic() + 60
    while (queued := page.evaluate(OPENED, template)) is None:
        assert time.monotonic() < deadline, "the page did not take the workflow"
        page.wait_for_timeout(500)
    assert page.faults == []
    assert queued.keys() == twin.keys()
    info = server.object_info()
    for key, node in twin.items():
        kind, found = node["class_type"], queued[key]["inputs"]
        assert queued[key]["class_type"] == kind
        assert {name: found[name] for name in node["inputs"]} == node["inputs"]
        assert set(found) - set(node["inputs"]) <= set(info[kind]["input"].get("optional", {}))
