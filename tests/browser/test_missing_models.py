"""A template whose models are not there: the page names each file and has its publisher's link."""

from __future__ import annotations

import json

import pytest
from pages import opened

from demo.templates import FOLDER

NAME = "1 Quantize on load - FLUX schnell"
HIDDEN = (
    "diffusion_models/flux1-schnell.safetensors", "text_encoders/clip_l.safetensors",
    "vae/ae.safetensors",
)  # fmt: skip
REFRESH = "async () => window.app.refreshComboInNodes()"
GROUP, ROWS = "[data-testid=error-group-missing-model]", "[data-testid=missing-model-download]"


@pytest.fixture
def hidden(server, page):
    """Some models are taken away, and put back."""
    files = [server.base / "models" / name for name in HIDDEN]
    for file in files:
        file.rename(file.with_suffix(".hidden"))
    page.evaluate(REFRESH)
    yield [file.name for file in files]
    for file in files:
        file.with_suffix(".hidden").rename(file)
    page.evaluate(REFRESH)


def test_each_is_listed_with_its_link(page, hidden, screenshots):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened(page, NAME)
    page.locator("[data-testid=error-overlay-see-errors]").click()
    group = page.locator(GROUP)
    group.wait_for()
    page.screenshot(path=screenshots / "missing-models.png")
    saved = json.loads((FOLDER / f"{NAME}.json").read_text(encoding="utf-8"))
    links = {m["name"]: m["url"] for n in saved["nodes"] for m in n["properties"].get("models", ())}
    assert group.locator(ROWS).count() == len(hidden)
    found = {}  # to be read by people: the page of the file, not the file
    for copy in group.get_by_role("button", name="Copy URL").all():
        copy.click()
        link = page.evaluate("navigator.clipboard.readText()")
        found[link.rpartition("/")[2]] = link
    assert found == {name: links[name].replace("/resolve/", "/blob/") for name in hidden}
    for name in hidden:
        assert group.get_by_role("button", name=f"Download {name}").count() == 1
