"""LoRAs on calibrated layers of a MODEL (ComfyUI 0.30.0): added while the model runs.

Each code of a calibrated layer makes up for the errors of others.  Rounding the weight again, with a
LoRA in it, would lose that.  So ComfyUI's patch is applied to the dequantized weight at each run, as
ComfyUI does by itself for layers that it offloads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

KEY = "qsched_loras"


class RunTimePatch(LowVramPatch):
    """Adds a layer's patches to its weight, unless ComfyUI does so itself."""

    def __init__(self, layer, key: str, patches):
        super().__init__(key, patches)
        self.layer = weakref.ref(layer)

    def __call__(self, weight):
        layer = self.layer()
        functions = () if layer is None else layer.weight_function
        if any(isinstance(f, LowVramPatch) and f is not self for f in functions):
            return weight
        return super().__call__(weight)


def at_run_time(patcher) -> None:
    """Have LoRAs on calibrated layers of ``patcher`` and its clones applied while they run."""
    if not patcher.get_callbacks(CallbacksMP.ON_LOAD, KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _loaded)


def _loaded(patcher, *_) -> None:
    """ComfyUI has placed the weights, and left the calibrated ones as they were."""
    if patcher.is_dynamic():  # it applies every patch at run time
        return
    for name, layer in patcher.model.named_modules():
        key = f"{name}.weight"
        if key in patcher.patches and is_calibrated(layer) and not layer.merges_patches:
            layer.weight_function = [
                *layer.weight_function,
                RunTimePatch(layer, key, patcher.patches),
            ]


def is_calibrated(layer) -> bool:
    stored = getattr(layer, "stored", None)
    return stored is not None and stored.calibrated is not None


@contextmanager
def merged(model) -> Iterator[None]:
    """Inside, ComfyUI rounds a MODEL's patches into its calibrated layers too, for a file."""
    layers = [model.model.diffusion_model.get_submodule(name) for name in patched(model)]
    if layers:  # what is loaded was loaded without
        comfy.model_management.unload_model_and_clones(model)
    for layer in layers:
        layer.merges_patches = True
    try:
        yield
    finally:
        for layer in layers:
            layer.merges_patches = False
        if layers:
            comfy.model_management.unload_model_and_clones(model)


def patched(model) -> list[str]:
    """The calibrated layers of a MODEL that have patches: merging would round them again."""
    return [
        name
        for name, layer in model.model.diffusion_model.named_modules()
        if is_calibrated(layer) and f"diffusion_model.{name}.weight" in model.patches
    ]
