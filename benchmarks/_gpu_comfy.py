"""Rows that need ComfyUI: its own loading and sampling on the device, with this pack's loader."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ._gpu_plan import Bench, Measured, Row, SkipRow


def _host(bench: Bench):
    """The pack's loading side, and what benchmarks/loading.py has for it."""
    if "COMFYUI_PATH" not in os.environ:
        raise SkipRow("needs ComfyUI: run it by dev.py, or set COMFYUI_PATH to its folder")
    loading = importlib.import_module("benchmarks._host").import_pack(cpu=not bench.cuda)
    return loading, importlib.import_module("benchmarks.loading")


def _with_file(bench: Bench, run: Callable) -> Measured:
    loading, shared = _host(bench)
    families = importlib.import_module("benchmarks._families")
    family = shared.WIDE
    if bench.tiny:
        family = shared.SMALL.smaller(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
    with tempfile.TemporaryDirectory(prefix="qsched-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        families.write_random(family, path)
        ours = partial(loading.load_diffusion_model, str(path), loading.Request("nf4"))
        stock = partial(shared.stock_model, path)
        try:
            return run(shared, family, ours, stock)
        finally:
            importlib.import_module("comfy.model_management").unload_all_models()


@contextmanager
def _dynamically(bench: Bench) -> Iterator[None]:
    """ComfyUI's dynamic loading; SkipRow where there is none."""
    host = importlib.import_module("benchmarks._host")
    if not bench.cuda or not host.can_load_dynamically():
        raise SkipRow("needs an NVIDIA GPU that comfy-aimdo knows")
    with host.loading_dynamically():
        yield
        importlib.import_module("comfy.model_management").unload_all_models()


def _arguments(bench: Bench, shared):
    x, sigma, conditions = shared.inputs(1, 4 if bench.tiny else 64)
    moved = {name: value.to(bench.device) for name, value in conditions.items()}
    return x.to(bench.device), sigma.to(bench.device), moved


def load(bench: Bench) -> Measured:
    """Seconds and peak memory until a FLUX-like model is on the device, over ComfyUI's own."""

    def run(shared, family, ours, stock) -> Measured:
        found, management = [], importlib.import_module("comfy.model_management")
        for way in (stock, ours) * 2:  # the first of each warms up
            bench.clear()
            started = time.perf_counter()
            model = shared.loaded(way())
            bench.sync()
            found.append((time.perf_counter() - started, bench.peak()))
            management.unload_all_models()
            del model
        (other, other_peak), (seconds, peak) = found[2:]
        detail = {"peak_gb": peak, "other_peak_gb": other_peak}
        return Measured(seconds, other, seconds / other, "s", 1, detail)

    return _with_file(bench, run)


def step(bench: Bench) -> Measured:
    """A forward of the loaded model, ComfyUI's own over ours."""
    return _with_file(bench, partial(_forward, bench))


def _forward(bench: Bench, shared, family, *ways) -> Measured:
    arguments = _arguments(bench, shared)
    calls = [partial(shared.forward, shared.loaded(way()), arguments) for way in ways]
    seconds, other = bench.seconds(*calls)
    return Measured(seconds, other, other / seconds, "s/step", bench.runs)


def _with_lora(model, weights):
    load = importlib.import_module("comfy.sd").load_lora_for_models
    return load(model, None, weights, 1.0, 0.0)[0]


def lora(bench: Bench) -> Measured:
    """Offloaded weights with a LoRA that ComfyUI adds in each forward, over those without."""

    def run(shared, family, ours, stock) -> Measured:
        arguments, found, plain = _arguments(bench, shared), [], ours()
        for model in (_with_lora(plain, shared.lora_of(family, 0)), plain):
            model.patch_model(device_to=torch.device(bench.device), lowvram_model_memory=1)
            found += bench.seconds(partial(shared.forward, model, arguments))
            model.unpatch_model()
        return Measured(found[0], found[1], found[0] / found[1], "s/step", bench.runs)

    return _with_file(bench, run)


def dynamic_step(bench: Bench) -> Measured:
    """A forward of both, loaded dynamically."""

    def run(*found) -> Measured:  # the file is written before: layers have no weights meanwhile
        with _dynamically(bench):
            return _forward(bench, *found)

    return _with_file(bench, run)


def dynamic_lora(bench: Bench) -> Measured:
    """The same with a LoRA, which is added to nf4's weights each time."""

    def run(shared, family, *ways) -> Measured:
        weights = shared.lora_of(family, 0)

        def patched(way: Callable):
            return _with_lora(way(), weights)

        with _dynamically(bench):
            return _forward(bench, shared, family, *(partial(patched, way) for way in ways))

    return _with_file(bench, run)


def rows() -> Iterator[Row]:
    for name, run, what in (
        ("load", load, "a FLUX-like model through the pack's loader, over ComfyUI's own"),
        ("step", step, "its forward, ComfyUI's own over nf4's"),
        ("lora", lora, "offloaded nf4 with a LoRA at run time, over without"),
        ("dynamic_step", dynamic_step, "the forward, both loaded dynamically"),
        ("dynamic_lora", dynamic_lora, "the forward with a LoRA, both loaded dynamically"),
    ):
        yield Row(f"comfyui.{name}.nf4", what, 5, 30, run, ("safetensors",))
