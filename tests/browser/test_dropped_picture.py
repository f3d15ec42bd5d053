"""A picture of a calibration, dropped into the page, is made again without learning."""

from __future__ import annotations

import base64
import io
import json
import shutil

import pytest
from pages import few_prompts, opened_demo, queued
from PIL import Image
from standins import CANVASES

DROP = """async ([content]) => {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0))
    await window.app.handleFile(new File([bytes], 'dropped.png', {type: 'image/png'}))
}"""
LEARNED = """() => window.app.graph.nodes.find((n) => n.type === 'QSchedJAQCalibrator')
    ?.widgets.find((w) => w.name === 'learned')?.value"""


@pytest.fixture(scope="module")
def picture(server, page) -> bytes:
    """Of the demo's template, learned with few prompts and a small budget."""
    opened_demo(page)
    few_prompts(page)
    entry = server.wait(queued(page), 240)
    (made,) = entry["outputs"]["11"]["images"]
    return server.image(made)


@pytest.mark.parametrize("canvas", CANVASES, indirect=True)
def test_it_needs_no_record_of_the_search(server, page, canvas, picture):
    shutil.rmtree(server.base / "user" / "qsched" / "studies", ignore_errors=True)
    page.evaluate("window.app.graph.clear()")
    page.evaluate(DROP, [base64.b64encode(picture).decode()])
    learned = page.wait_for_function(LEARNED, timeout=30_000).json_value()
    assert json.loads(learned)["schedule"]["format"] == "qsched"
    entry = server.wait(queued(page), 120)
    assert json.loads(entry["outputs"]["4"]["text"][0])["new_trials"] == 0
    (made,) = entry["outputs"]["11"]["images"]
    one, two = (Image.open(io.BytesIO(p)).convert("RGB") for p in (picture, server.image(made)))
    assert one.tobytes() == two.tobytes()
    assert not (server.base / "user" / "qsched" / "studies").exists()
