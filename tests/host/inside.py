"""ComfyUI and the pack in this process, and a small model of theirs; conftest.py has the fixtures."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
# cpu, cuda, or simulated: see simulated_host.py.
DEVICE = os.environ.get("QSCHED_TEST_DEVICE", "cpu")


def _import_host():
    """ComfyUI on DEVICE, and the pack's loading side under a package name of its own."""
    if DEVICE == "cuda":
        importlib.import_module("benchmarks._host").prepare_dynamic_loading()
    importlib.import_module("comfy.cli_args").args.cpu = DEVICE != "cuda"
    for name, folder in (("qsched_pack", REPO), ("qsched_pack.nodes", REPO / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)
    return importlib.import_module("qsched_pack.nodes.host.weights.loading")


loading = _import_host()
comfy_sd = importlib.import_module("comfy.sd")
comfy_sample = importlib.import_module("comfy.sample")
management = importlib.import_module("comfy.model_management")
demo = importlib.import_module("qsched_pack.demo.mmdit")
taesd = importlib.import_module("qsched_pack.demo.taesd")
formats = importlib.import_module("qsched_pack.qsched_core.formats")
save_file = importlib.import_module("safetensors.torch").save_file

Request = loading.Request
_SIMULATED = torch.device("cuda:0")
LOAD_DEVICE = _SIMULATED if DEVICE == "simulated" else management.get_torch_device()
NAMES = [n for n in formats.names() if formats.get(n).available(LOAD_DEVICE) is None]
# Relative distance of a 4-step sample to the unquantized model's, random weights.
DISTANCE = {
    "nf4": 0.17, "fp4": 0.2, "llm_int8": 0.015, "int8": 0.015, "int8_convrot": 0.02, "w4a8": 0.12,
    "w4a8_convrot": 0.12, "w4a4": 0.4, "svdquant_w4a4": 0.3, "int3": 0.16, "int2": 0.27,
    "fp8_e4m3": 0.05, "nvfp4": 0.21, "mxfp8": 0.055,
}  # fmt: skip
QUICK = ("nf4", "int8", "int2", "w4a8")  # one of each kind of arithmetic; --full has them all
ALL = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in NAMES]
)


def weights() -> dict[str, torch.Tensor]:
    """A small SD3 with random weights, of the demo model's architecture."""
    torch.manual_seed(0)
    state = demo.MMDiT(depth=3).state_dict()
    for key, value in state.items():
        if (
            "adaLN_modulation" in key
            or key == "final_layer.linear.weight"
            or (key.startswith("t_embedder") and value.ndim == 2)
        ):
            state[key] = torch.randn_like(value) * 0.1
    narrow = state["context_embedder.weight"]
    state["context_embedder.weight"] = torch.nn.functional.pad(narrow, (0, 4096 - narrow.shape[1]))
    return {key: value.half() for key, value in state.items()}


def with_lora(model, lora, strength=1.0):
    return comfy_sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def relative(found, wanted) -> float:
    found, wanted = found.detach().cpu().float(), wanted.detach().cpu().float()
    return ((found - wanted).norm() / wanted.norm()).item()


def state_bytes(model):
    """The stored weights, bit for bit."""
    state = model.model.diffusion_model.state_dict()
    return {k: v.detach().cpu().flatten().view(torch.uint8).clone() for k, v in state.items()}


def same_state(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
