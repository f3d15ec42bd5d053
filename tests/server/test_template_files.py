"""The templates are what their code makes of today's schemas."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from demo.run import CELL as SHEET_CELL
from demo.run import SHOWN
from demo.templates import CELL, FOLDER, LEFT, ROWS, SHEET, TEMPLATES, TOP, thumbnail
from devtools.server import PACK_NAME, PACK_ROOT


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_both_files_are_remade_to_the_letter(server, template):
    """Else: python -m demo.templates."""
    graph = template.graph(server.object_info())
    for made, folder in ((graph.page(template.name), FOLDER), (graph.api(), FOLDER / "api")):
        shipped = json.loads((folder / f"{template.name}.json").read_text(encoding="utf-8"))
        assert shipped == json.loads(json.dumps(made))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_file_that_a_loader_names_has_its_link(template):
    text = (FOLDER / f"{template.name}.json").read_text(encoding="utf-8")
    nodes = json.loads(text)["nodes"]
    named = {
        value
        for node in nodes
        for value in node.get("widgets_values", ())
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    models = [model for node in nodes for model in node["properties"].get("models", ())]
    assert {model["name"] for model in models} == named
    for model in models:
        assert model["url"].startswith("https://huggingface.co/")
        assert "/resolve/main/" in model["url"]
        assert model["url"].endswith("/" + model["name"])
        assert model["directory"] in ("checkpoints", "diffusion_models", "text_encoders", "vae")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_it_has_notes_and_a_thumbnail(template):
    text = (FOLDER / f"{template.name}.json").read_text(encoding="utf-8")
    notes = [n for n in json.loads(text)["nodes"] if n["type"] == "MarkdownNote"]
    assert notes and all(len(note["widgets_values"][0]) > 40 for note in notes)
    assert thumbnail(template).size == (512, 512)
    assert (FOLDER / f"{template.name}.jpg").is_file()


def test_thumbnails_are_cut_where_the_demos_pictures_are():
    """A sheet with other rows would put a picture under another's name."""
    assert SHEET_CELL == CELL
    with Image.open(SHEET) as sheet:
        assert sheet.size == (LEFT + SHOWN * CELL, TOP + len(ROWS) * CELL)


def test_no_template_is_left_over_from_a_title_of_before():
    names = {path.stem for path in (PACK_ROOT / "workflows").glob("*.json")}
    assert names == {t.name for t in TEMPLATES}


def test_the_demos_workflow_is_no_template(server):
    """Users have none of its models; dev.py serve puts it among the workflows."""
    assert set(server.get("/api/workflow_templates")[PACK_NAME]) == {t.name for t in TEMPLATES}
