"""A mistake in the page: one error, at the node that it was made on, in our words."""

from __future__ import annotations

import pytest
from pages import few_prompts, opened_demo
from standins import CANVASES

SET = """([id, name, value]) => {
    window.app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = value
}"""
RUN = "window.app.queuePrompt(0, 1)"
OVERLAY, MORE = "[data-testid=error-overlay]", "[data-testid=error-overlay-see-errors]"
GROUPS = "[data-testid^=error-group-]:not([data-testid=error-group-display-message])"
TEXT = """([id]) => window.app.graph.getNodeById(id).widgets
    .find((w) => w.name === '$$node-text-preview')?.value"""
MARKED = "() => window.app.graph.nodes.filter((node) => node.has_errors).map((node) => +node.id)"
EMPTY = "async () => fetch('/api/queue', {method: 'POST', body: JSON.stringify({clear: true})})"
IDLE = "async () => !(await (await fetch('/api/queue')).json()).queue_running.length"


def mistaken(page, node: int, name: str, value):
    """The errors that the page lists, after a run with one wrong value."""
    opened_demo(page)
    few_prompts(page)
    page.evaluate(SET, [node, name, value])
    page.evaluate(RUN)
    page.locator(OVERLAY).wait_for(timeout=60_000)
    page.locator(MORE).click()
    groups = page.locator(GROUPS)
    groups.first.wait_for()
    # What can run without the mistake does: it is not waited for.
    page.evaluate(EMPTY)
    page.evaluate("window.app.api.interrupt()")
    page.wait_for_function(IDLE, polling=200)
    return groups


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_what_is_seen_before_a_run_is_marked_on_its_input(page, canvas):
    name = "../outside"
    groups = mistaken(page, 5, "name", name)
    assert groups.count() == 1
    assert page.evaluate(MARKED) == [5]
    assert "Save Q-Sched Schedule - name" in groups.inner_text()
    groups.get_by_role("button", name="Info for").click()
    told = page.get_by_text("has a part that begins with a dot")
    told.first.wait_for()
    assert told.count() == 1 and f"name='{name}'" in told.inner_text()


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_what_a_run_finds_stands_on_its_node(page, canvas, screenshots):
    """The first line is the sentence; a run without the mistake takes it away."""
    groups = mistaken(page, 2, "heldout", "# none")
    sentence = "heldout has no prompts; write one a line (lines with # are comments)"
    assert groups.count() == 1 and "Calibration Prompts" in groups.inner_text()
    assert page.evaluate(TEXT, [2]) == sentence
    assert f"qsched.PromptError: {sentence}" in groups.inner_text()
    page.screenshot(path=screenshots / f"mistake-{canvas}.png")
    groups = mistaken(page, 4, "width", 264)
    assert groups.count() == 1 and "JAQ Calibrator" in groups.inner_text()
    assert page.evaluate(TEXT, [4]).startswith("width=264 ")
    assert page.evaluate(TEXT, [2]) == "2 prompts to search on, 2 to judge by"
