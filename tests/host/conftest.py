"""ComfyUI itself in the tests' own process: no server, and each model loaded once a session."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hostpath import comfyui_folder

# First, as in a real server: both ComfyUI and the pack have something named `nodes`.
sys.path.insert(0, str(comfyui_folder()))

from inside import DEVICE, Request, comfy_sample, comfy_sd, loading, save_file, weights
from simulated_host import simulated_host

hooks = importlib.import_module("comfy.hooks")


@pytest.fixture(scope="session", autouse=True)
def device():
    """The whole session on a GPU that is not there, if that is asked for."""
    with simulated_host() if DEVICE == "simulated" else nullcontext():
        yield


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(weights(), path)
    return str(path)


@pytest.fixture(scope="session")
def plain(file):
    return comfy_sd.load_diffusion_model(file)


@pytest.fixture(scope="session")
def loaded(file) -> Callable:
    """``loaded(format)``: a clone of the one model of that format, for tests that leave it as it is."""
    models: dict = {}

    def model(name: str):
        if name not in models:
            models[name] = loading.load_diffusion_model(file, Request(name))
        return models[name].clone()

    return model


@pytest.fixture(scope="session")
def conditioning():
    torch.manual_seed(1)
    return [[torch.randn(1, 77, 4096), {"pooled_output": torch.randn(1, 2048)}]]


@pytest.fixture(scope="session")
def sample(conditioning):
    def run(model):
        empty = torch.zeros(1, 16, 12, 12)
        noise = comfy_sample.prepare_noise(empty, 3)
        return comfy_sample.sample(
            model, noise, 4, 1.0, "euler", "simple", conditioning, conditioning, empty,
            seed=3, disable_pbar=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def lora():
    torch.manual_seed(2)
    return {
        f"diffusion_model.{key.removesuffix('.weight')}.lora_{side}.weight": torch.randn(shape)
        * 0.2
        for key, value in weights().items()
        if "joint_blocks" in key and key.endswith(".weight") and value.ndim == 2
        for side, shape in (("A", (4, value.shape[1])), ("B", (value.shape[0], 4)))
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Callable:
    """``files(small)``: a clone of its MODEL, which is loaded once."""
    folder, models = tmp_path_factory.mktemp("models"), {}

    def opened(small):
        if small.name not in models:
            path = folder / f"{small.name}.safetensors"
            save_file(small.weights(), path)
            models[small.name] = comfy_sd.load_diffusion_model(str(path))
        return models[small.name].clone()

    return opened


@pytest.fixture(scope="session")
def hooked(conditioning, lora):
    """A sample with one hook on the positive side and its opposite on the negative, by turns.

    From the second step on the host takes patched weights from its cache, until a keyframe changes
    their strength.
    """

    def run(model, strength=1.0, keyframes=False):
        other = {k: -v if ".lora_B." in k else v for k, v in lora.items()}
        conds = []
        for part in (lora, other):
            group = hooks.create_hook_lora(part, strength, 0.0)
            if keyframes:
                frames = hooks.HookKeyframeGroup()
                frames.add(hooks.HookKeyframe(1.0, 0.0))
                frames.add(hooks.HookKeyframe(0.2, 0.5))
                group.set_keyframes_on_hooks(frames)
            conds.append(hooks.set_hooks_for_conditioning(conditioning, group))
        empty = torch.zeros(1, 16, 12, 12)
        noise = comfy_sample.prepare_noise(empty, 3)
        return comfy_sample.sample(
            model, noise, 4, 2.0, "euler", "simple", *conds, empty, seed=3, disable_pbar=True
        )  # fmt: skip

    return run
