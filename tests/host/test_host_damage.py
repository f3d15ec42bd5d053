"""Files whose header is sound and whose tensors are not a model's: one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inside import REPO, Request, formats, loading, save_file
from safetensors import safe_open

LAYER = "joint_blocks.0.x_block.mlp.fc1"


def opened(name: str):
    with safe_open(REPO / "tests" / "golden" / "models" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def load(path: Path, tensors, metadata, name: str):
    save_file(tensors, path, metadata)
    return loading.load_diffusion_model(str(path), Request(name))


def _find(tensors, ending: str) -> str:
    return next(key for key in tensors if key.endswith(f"{LAYER}{ending}"))


def _reshaped(tensors, metadata):
    key = _find(tensors, ".bias")
    tensors[key] = tensors[key].reshape(2, -1).contiguous()


def _without_weight(tensors, metadata):
    for key in [key for key in tensors if f"{LAYER}.weight" in key or f"{LAYER}.comfy" in key]:
        del tensors[key]


def _without_entry(tensors, metadata):
    del tensors[_find(tensors, ".comfy_quant")]


def _other_name(tensors, metadata):
    tensors[f"a\n\u202e{LAYER}.comfy_quant"] = tensors.pop(_find(tensors, ".comfy_quant"))


def _no_object(tensors, metadata):
    metadata["qsched"] = "[1]"


def _no_json(tensors, metadata):
    metadata["qsched"] = '{"source": '


def _other_type(tensors, metadata):
    metadata["qsched"] = json.dumps({**json.loads(metadata["qsched"]), "source_hash": 3})


CASES = {
    _reshaped: "can't be loaded as a diffusion model",
    _without_weight: "has no weight in the file|can't be loaded",
    _without_entry: "packs float weights|has a weight of the shape|nothing in the file says|can't be",
    _other_name: r"layer 'a\\n\\u202e.*has no tensor",
    _no_object: "'qsched' of its metadata is no JSON object",
    _no_json: "'qsched' of its metadata is no JSON object",
    _other_type: "'source_hash' in 'qsched' of its metadata is 3, no text",
}


@pytest.mark.parametrize("change", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_it_is_refused_with_the_reason(name, change, tmp_path):
    tensors, metadata = opened(name)
    change(tensors, metadata)
    with pytest.raises(formats.FormatError, match=CASES[change]) as error:
        load(tmp_path / "broken.safetensors", tensors, metadata, name)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


@pytest.mark.parametrize("shape", [(1, -1), (2, -1)])
def test_a_native_formats_table_of_another_shape_is_named(shape, tmp_path):
    tensors, metadata = opened("int8")
    key = _find(tensors, ".weight_scale")
    tensors[key] = tensors[key].reshape(shape).contiguous()
    with pytest.raises(formats.FormatError, match=rf"broken\.safetensors: layer .*{LAYER}.*scale"):
        load(tmp_path / "broken.safetensors", tensors, metadata, "int8")


def test_one_number_for_all_rows_is_what_other_programs_write(tmp_path):
    tensors, metadata = opened("int8")
    key = _find(tensors, ".weight_scale")
    tensors[key] = torch.tensor(0.01)
    load(tmp_path / "other.safetensors", tensors, metadata, "int8")
