"""weight_format "recommended": a format is chosen, and the node says which."""

from __future__ import annotations

import re

import pytest

FILE = "qsched_demo.safetensors"


def loading(weight_format: str, folder: str = "ckpt_name", name: str = FILE, layers="") -> dict:
    kind = {"ckpt_name": "QSchedLoadCheckpoint", "unet_name": "QSchedLoadDiffusionModel"}[folder]
    inputs = {folder: name, "weight_format": weight_format, "layers": layers}
    graph = {"1": {"class_type": kind, "inputs": inputs}}
    return graph | shown(["1", 3 if folder == "ckpt_name" else 1])


def shown(source) -> dict:
    return {"2": {"class_type": "PreviewAny", "inputs": {"source": source}}}


def said(server, graph) -> str:
    return server.run(graph, 120)["outputs"]["2"]["text"][0]


def test_it_says_what_it_chose_and_why(server):
    text = said(server, loading("recommended"))
    first, second = text.splitlines()[:2]
    chosen = re.match(
        r"recommended: (\w+), about ([\d.]+) MB of [\d.]+ \wB free on (cpu|cuda)", first
    )
    assert chosen, first
    assert second.endswith(f": {chosen[1]}")
    measured = float(re.search(r"-> ([\d.]+) MB", text)[1])
    assert float(chosen[2]) == pytest.approx(measured, rel=0.05)


def test_a_saved_file_keeps_its_format(server):
    save = {
        "1": {"class_type": "QSchedLoadCheckpoint", "inputs": {"ckpt_name": FILE, "weight_format": "int2"}},
        "3": {
            "class_type": "QSchedSaveModel",
            "inputs": {"model": ["1", 0], "filename_prefix": "diffusion_models/keeps"},
        },
    }  # fmt: skip
    server.run(save, 120)
    options = server.object_info()["QSchedLoadDiffusionModel"]["input"]["required"]["unet_name"]
    (name,) = (n for n in options[1]["options"] if n.startswith("keeps"))
    text = said(server, loading("recommended", "unet_name", name))
    assert text.startswith("recommended: int2, as the file was saved")


def test_a_model_that_is_loaded_and_its_text_encoder_too(server):
    for kind, slot, link in (
        ("QSchedQuantizeModel", "model", 0),
        ("QSchedQuantizeTextEncoder", "clip", 1),
    ):
        graph = {
            "0": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": FILE}},
            "1": {"class_type": kind, "inputs": {slot: ["0", link], "weight_format": "recommended"}},
        } | shown(["1", 1])  # fmt: skip
        assert re.match(r"recommended: \w+, about", said(server, graph)), kind


def test_layers_are_checked_before_anything_runs(server):
    with pytest.raises(Exception, match="nf5"):
        server.queue(loading("recommended", layers="mlp=nf5"))
