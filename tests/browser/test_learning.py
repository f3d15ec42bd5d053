"""A calibration in the page: stopped and continued, finished, and of two users at once."""

from __future__ import annotations

import io
import json

import pytest
from pages import few_prompts, opened_demo, photographed, queued
from PIL import Image

CALIBRATOR, SAVED = 4, 11  # nodes of the demo's workflow
BUDGET = """([budget]) => {
    window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'budget.number').value = budget
}"""
# What the page is told while it runs, and shows: texts on the calibrator, runs, kinds of events.
LISTEN = """([id]) => {
    const heard = window.heard = {told: [], texts: [], runs: [], ends: []}, {api} = window.app
    const shown = () => window.app.graph.getNodeById(id)?.widgets
        .find((w) => w.name === '$$node-text-preview')?.value
    const of = {
        progress_text: (e) => {
            heard.told.push(e.detail.text)
            heard.texts.push(shown() ?? '')
        },
        executed: (e) => heard.runs.push(e.detail.prompt_id),
        b_preview_with_metadata: (e) => heard.runs.push(e.detail.jobId),
        execution_interrupted: (e) => heard.ends.push(e.detail.prompt_id),
    }
    window.deafened?.()
    for (const [kind, told] of Object.entries(of)) api.addEventListener(kind, told)
    window.deafened = () => {
        for (const [kind, told] of Object.entries(of)) api.removeEventListener(kind, told)
    }
}"""
VUE = "([on]) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
AT_TRIAL = "([trial]) => window.heard.texts.some((text) => text.includes(`trial ${trial} of`))"
# Whether the picture that a node shows has this width and height.
SHOWS = {
    "classic": """([id, wide, tall]) => {
        const picture = window.app.graph.getNodeById(id).imgs?.at(-1)
        return picture?.naturalWidth === wide && picture.naturalHeight === tall
    }""",
    "nodes 2.0": """([id, wide, tall]) => {
        const picture = [...document.querySelectorAll(`[data-node-id="${id}"] img`)].at(-1)
        return picture?.naturalWidth === wide && picture.naturalHeight === tall
    }""",
}


def learning(page, budget: int) -> None:
    """The demo's workflow with few prompts and so many candidates."""
    opened_demo(page)
    few_prompts(page)
    page.evaluate(BUDGET, [budget])
    page.evaluate(LISTEN, [CALIBRATOR])


@pytest.fixture
def users(page, other):
    """Two pages, one in each canvas."""
    found = {"classic": page, "nodes 2.0": other}
    for canvas, user in found.items():
        user.faults.clear()
        user.evaluate(VUE, [canvas != "classic"])
    return found


def test_a_stopped_run_continues_and_says_from_where(server, page):
    learning(page, 12)
    stopped = queued(page)
    page.wait_for_function(AT_TRIAL, arg=[3], timeout=120_000)
    page.get_by_role("button", name="Cancel current run").click()
    page.wait_for_function("() => window.heard.ends.length", timeout=60_000)
    assert page.evaluate("window.heard.ends") == [stopped]
    page.evaluate(LISTEN, [CALIBRATOR])
    entry = server.wait(queued(page), 240)
    report = json.loads(entry["outputs"][str(CALIBRATOR)]["text"][0])
    known = len(report["trials"]) - report["new_trials"]
    assert known >= 2
    texts = page.evaluate("window.heard.texts")
    assert any(f"continuing from trial {known}, search: trial" in text for text in texts)


def test_two_users_at_once_see_their_own_runs_and_the_report_last(server, users, screenshots):
    runs, budgets = {}, dict(zip(users, (6, 5), strict=True))
    for canvas, user in users.items():
        learning(user, budgets[canvas])
    for canvas, user in users.items():
        runs[canvas] = queued(user)
    for canvas, user in users.items():
        entry = server.wait(runs[canvas], 240)
        texts, heard = user.evaluate("[window.heard.told, window.heard.runs]")
        assert set(heard) == {runs[canvas]}
        trials = {text.partition(" of ")[2].partition(",")[0] for text in texts if "trial" in text}
        assert trials == {str(budgets[canvas] + 1)}
        for node in (CALIBRATOR, SAVED):
            (made,) = entry["outputs"][str(node)]["images"]
            wanted = Image.open(io.BytesIO(server.image(made))).size
            user.wait_for_function(SHOWS[canvas], arg=[node, *wanted], timeout=30_000)
        photographed(user, CALIBRATOR, canvas, screenshots / f"calibration-{canvas}.png")
        assert user.faults == []
