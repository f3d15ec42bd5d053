"""LoRAs on quantized layers of a MODEL (ComfyUI 0.30.0) that are added while the model runs.

Each code of a calibrated layer makes up for the errors of others.  Rounding the weight again, with a
LoRA in it, would lose that.  So ComfyUI's patch is applied to the dequantized weight at each run, as
ComfyUI does by itself for layers that it offloads.

Where ComfyUI loads dynamically (NVIDIA GPUs, unless told otherwise) it would round each patched layer
again from its dequantized weight.  Fewer than ``KEPT_BITS`` bits lose more by that than a LoRA is
worth: there it is added while the model runs, too.
"""

from __future__ import annotations

import weakref

from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from ....qsched_core.formats import get

KEY = "qsched_loras"
KEPT_BITS = 8  # from here on rounding again costs little, and keeps the format's fast products


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
    """Have LoRAs on quantized layers of ``patcher`` and its clones applied while they run, if they must."""
    if not patcher.get_callbacks(CallbacksMP.ON_LOAD, KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _loaded)


def _loaded(patcher, *_) -> None:
    """ComfyUI has placed the weights, or, loading dynamically, has said what happens to each."""
    for name, layer in patcher.model.named_modules():
        if getattr(layer, "stored", None) is None:
            continue
        key = f"{name}.weight"
        functions = [f for f in layer.weight_function if not isinstance(f, RunTimePatch)]
        if key in patcher.patches and _added_by_us(layer):
            layer.weight_lowvram_function = None  # ComfyUI's own, where it loads dynamically
            functions.append(RunTimePatch(layer, key, patcher.patches))
        layer.weight_function = functions


def _added_by_us(layer) -> bool:
    dynamic = getattr(layer, "weight_lowvram_function", None) is not None
    few_bits = get(layer.choice.format).bits < KEPT_BITS
    return is_calibrated(layer) or (dynamic and few_bits)


def is_calibrated(layer) -> bool:
    stored = getattr(layer, "stored", None)
    return stored is not None and stored.calibrated is not None


def patched(model) -> list[str]:
    """The calibrated layers of a MODEL that have patches: merging would round them again."""
    return [
        name
        for name, layer in model.model.diffusion_model.named_modules()
        if is_calibrated(layer) and f"diffusion_model.{name}.weight" in model.patches
    ]
