"""One ComfyUI and one Chromium for every test of this folder.

Pictures of the page are kept in $QSCHED_SCREENSHOTS, or output/screenshots.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import standins
from hostpath import comfyui_folder

from devtools.server import ComfyServer, device_args

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
READY = """() => window.app?.graph && window.LiteGraph?.registered_node_types
    && 'QSchedJAQCalibrator' in window.LiteGraph.registered_node_types"""


@pytest.fixture(scope="session")
def playwright():
    return pytest.importorskip("playwright.sync_api", reason="needs playwright")


@pytest.fixture(scope="session")
def chromium(playwright) -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def server(chromium, tmp_path_factory) -> Iterator[ComfyServer]:
    """A server with stand-ins for every model that the templates name."""
    base = tmp_path_factory.mktemp("browser")
    standins.place(base / "models")
    (base / "input").mkdir()
    standins.picture(base / "input")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
    with ComfyServer(comfyui_folder(), base, extra_args=device_args()) as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright, chromium) -> Iterator:
    with playwright.sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=chromium, args=[*FLAGS])
        yield running
        running.close()


def entered(browser, server):
    """ComfyUI's page, for a user of its own, with every node of the pack known.

    ``page.faults`` are its errors.
    """
    opened = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    opened.faults = []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_function(READY, timeout=120_000)
    # The page opens a workflow of its own while it starts.
    opened.wait_for_function("() => window.app.graph.nodes?.length > 0", timeout=60_000)
    return opened


@pytest.fixture(scope="session")
def page(server, browser):
    return entered(browser, server)


@pytest.fixture(scope="module")
def other(server, browser) -> Iterator:
    """The page of a second user of the same server, at the same time."""
    opened = entered(browser, server)
    yield opened
    opened.context.close()


@pytest.fixture(scope="session")
def screenshots(repo_root) -> Path:
    folder = Path(os.environ.get("QSCHED_SCREENSHOTS", repo_root / "output" / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def canvas(request, page):
    """The page in one of ComfyUI's two canvases."""
    setting = "([on]) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(setting, [request.param != "classic"])
    return request.param


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.full)
