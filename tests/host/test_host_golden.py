"""Quantized files that an earlier version wrote, opened by this one: see tests/golden/README.md."""

from __future__ import annotations

import hashlib
import importlib
import json

import pytest
import torch
from inside import (
    LOAD_DEVICE,
    REPO,
    Request,
    comfy_sample,
    comfy_sd,
    loading,
    relative,
    same_state,
    state_bytes,
)

info = importlib.import_module("qsched_pack.nodes.host.weights.provenance")
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")

GOLDEN = REPO / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "models.json").read_text(encoding="utf-8"))
EVERY = pytest.mark.parametrize("name", EXPECTED)


def path(name: str) -> str:
    return str(GOLDEN / "models" / f"{name}.safetensors")


def opened(name: str):
    return loading.load_diffusion_model(path(name), Request(name))


def sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def digest(hashes: dict[str, str]) -> str:
    lines = "".join(f"{key} {value}\n" for key, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sample(model) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    text = torch.randn(1, 20, 64, generator=random)
    conditioning = [[text, {"pooled_output": torch.randn(1, 64, generator=random)}]]
    empty = torch.zeros(1, 16, 8, 8)
    noise = comfy_sample.prepare_noise(empty, 3)
    return comfy_sample.sample(
        model, noise, 2, 1.0, "euler", "simple", conditioning, conditioning, empty,
        seed=3, disable_pbar=True,
    )  # fmt: skip


@EVERY
def test_every_stored_byte_and_every_weight_is_what_it_was(name):
    model, wanted = opened(name), EXPECTED[name]
    assert digest({k: sha256(v) for k, v in state_bytes(model).items()}) == wanted["stored"]
    parameters = {k: p.data for k, p in model.model.diffusion_model.named_parameters()}
    packed = {k: v for k, v in parameters.items() if isinstance(v, loading.QuantizedTensor)}
    packed = {k: v.to("cpu") for k, v in packed.items()}
    assert {k: sha256(v.dequantize()) for k, v in packed.items()} == wanted["dequantized"]
    kept = {k: sha256(v) for k, v in parameters.items() if k not in packed}
    assert digest(kept) == wanted["kept"]


@EVERY
def test_what_the_file_says_of_itself_is_still_read(name):
    found = info.model_info(opened(name))
    assert {key: found[key] for key in EXPECTED[name]["info"]} == EXPECTED[name]["info"]


@EVERY
def test_it_samples_what_it_sampled(name):
    # the arithmetic's precision is the processor's; a wrong scale is ten times this
    wanted = torch.tensor(EXPECTED[name]["sample"])
    bound = 0.015 if LOAD_DEVICE.type == "cpu" else 0.03
    assert relative(sample(opened(name)).flatten()[::16], wanted) < bound


@EVERY
def test_it_can_be_saved_again(name, tmp_path):
    model = opened(name)
    saving.save_model(model, tmp_path / "again.safetensors")
    again = loading.load_diffusion_model(str(tmp_path / "again.safetensors"), Request(name))
    assert same_state(state_bytes(again), state_bytes(model))


def test_the_native_one_opens_in_plain_comfyui():
    model = comfy_sd.load_diffusion_model(path("int8"))
    wanted = torch.tensor(EXPECTED["int8"]["sample"])
    assert relative(sample(model).flatten()[::16], wanted) < 0.03
