"""Scorers inside ComfyUI (0.30.0): their files, and the memory manager they live under."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch

from ...qsched_core.scorers import (
    NAMED,
    DualEncoder,
    ScorerError,
    encoder_name,
    load_file,
    load_named,
)
from ...qsched_core.text import shown
from .folders import SCORER_FOLDER, is_name

BY_NAME = "(by open_clip's name)"
DOWNLOADS = "open_clip_downloads"  # a folder in models/clip_score


class ManagedPlacement:
    """Moves scorers to the device through ComfyUI's memory manager, as it moves models.

    A scorer may push other models out, and be pushed out."""

    def __init__(self):
        self._patchers: dict[int, comfy.model_patcher.ModelPatcher] = {}

    def __call__(self, module: torch.nn.Module) -> torch.device:
        patcher = self._patchers.get(id(module))
        if patcher is None:
            patcher = comfy.model_patcher.ModelPatcher(
                module,
                load_device=comfy.model_management.get_torch_device(),
                offload_device=comfy.model_management.text_encoder_offload_device(),
            )
            self._patchers[id(module)] = patcher
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        return patcher.load_device


def scorer_files() -> list[str]:
    """The files of ``models/clip_score``, and the choice of a model by name."""
    return [*weight_files(), *(encoder.label for encoder in NAMED), BY_NAME]


def weight_files() -> list[str]:
    """The files of ``models/clip_score``, without what was downloaded by name."""
    names = folder_paths.get_filename_list(SCORER_FOLDER)
    return [name for name in names if DOWNLOADS not in Path(name).parts]


def download_folder() -> Path:
    """Where models that are chosen by name are kept: below ``models/clip_score``."""
    return Path(folder_paths.get_folder_paths(SCORER_FOLDER)[0]) / DOWNLOADS


def is_by_name(name: str) -> bool:
    """Whether the choice ``name`` stands for a model of open_clip, and not for a file."""
    return name == BY_NAME or encoder_name(name) is not None


def scorer_path(name: str, called: str = "clip_name") -> Path:
    """The path of the weights ``name``; ScorerError, which names the input ``called``, if there are none."""
    found = folder_paths.get_full_path(SCORER_FOLDER, name) if is_name(name) else None
    if found is None:
        raise ScorerError(
            f"{called}={shown(name)} is not in models/{SCORER_FOLDER}; refresh the list, or copy it there"
        )
    return Path(found)


def load_encoder(
    name: str, architecture: str, allow_download: bool, place: ManagedPlacement
) -> DualEncoder:
    """The dual encoder of a file in ``models/clip_score``, or of open_clip's name."""
    if is_by_name(name):
        chosen = encoder_name(name) or architecture.strip()
        return load_named(chosen, allow_download, place, download_folder())
    return load_file(scorer_path(name), architecture.strip(), place, allow_download)
