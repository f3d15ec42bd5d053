"""The weight format where the user leaves it to us: by the memory that ComfyUI (0.30.0) can free."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ....qsched_core.formats.files import MappedFile
from ....qsched_core.formats.layer_entry import SUFFIX, read_entry
from ....qsched_core.formats.recommend import RECOMMENDED, Weight, recommend
from ....qsched_core.formats.registry import FORMATS
from . import files, layouts
from .loading import Request


def compute_device() -> torch.device:
    """Where ComfyUI runs its models."""
    return comfy.model_management.get_torch_device()


def free_for(device: torch.device) -> int:
    """Bytes on ``device`` that a model may take: free, or held by models that ComfyUI moves out.

    What ComfyUI itself sets aside for the computation is left out.
    """
    management = comfy.model_management
    free = management.get_free_memory(device)
    if not management.is_device_cpu(device):
        held = (m for m in management.current_loaded_models if m.device == device)
        free += sum(m.model_loaded_memory() for m in held if m.model is not None)
    return int(free - management.minimum_inference_memory())


def for_file(path: str, weight_format: str, layers: str) -> tuple[Request, str]:
    """The request for a file of weights, and what to say of the choice."""
    if weight_format != RECOMMENDED:
        return Request(weight_format, layers), ""
    saved = _saved(path)
    if saved is not None:
        return Request(saved, layers), f"{RECOMMENDED}: {saved}, as the file was saved"
    weights = {}
    if _is_mapped(path):
        mapped = MappedFile(path)
        prefix = files.prefix_of(mapped.entries)
        entries = {k: Weight(e.shape, e.nbytes) for k, e in mapped.entries.items()}
    else:
        state = comfy.utils.load_torch_file(path)
        prefix = files.prefix_of(state)
        entries = {k: Weight(tuple(v.shape), v.nbytes) for k, v in state.items()}
    for key, weight in entries.items():
        if key.startswith(prefix):
            weights[key.removeprefix(prefix).removesuffix(".weight")] = weight
    return _chosen(weights, layers, compute_device())


def for_module(
    module: torch.nn.Module, device: torch.device, weight_format: str, layers: str
) -> tuple[Request, str]:
    """The same for a model that is loaded already, and runs on ``device``."""
    if weight_format != RECOMMENDED:
        return Request(weight_format, layers), ""
    weights = {
        name.removesuffix(".weight"): Weight(tuple(p.shape), p.nbytes)
        for name, p in module.named_parameters()
    }
    return _chosen(weights, layers, device)


def _chosen(weights: dict[str, Weight], layers: str, device: torch.device) -> tuple[Request, str]:
    found = recommend(weights, layers, device, free_for(device))
    return Request(found.format, layers), found.describe()


def _is_mapped(path: str) -> bool:
    return Path(path).suffix.lower() in files.SAFETENSORS


def _saved(path: str) -> str | None:
    """The format in which most layers of a file were saved by this pack; None for another file."""
    if not _is_mapped(path):
        return None
    mapped, name = MappedFile(path), Path(path).name
    prefix = files.prefix_of(mapped.entries)
    found = [
        layouts.saved_format(read_entry(mapped.tensor(key), key, name))
        for key in mapped.entries
        if key.startswith(prefix) and key.endswith(SUFFIX)
    ]
    known = [form for form in found if form in FORMATS]
    return max(set(known), key=known.count) if known else None
