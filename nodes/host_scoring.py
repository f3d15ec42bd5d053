"""Scoring inside ComfyUI: scorers under its memory manager, and images scored as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch

from ..qsched_core.files import MOST_NAME
from ..qsched_core.objective import Objective, Scores
from ..qsched_core.precondition import ScalarCorrection
from ..qsched_core.prompts import PromptSet
from ..qsched_core.scorers import DualEncoder, ScorerError, load_file, load_named
from ..qsched_core.text import shown
from .host import SCORER_FOLDER, TrajectoryRunner

BY_NAME = "(by open_clip's name)"
IMAGE_BYTES = 2**29  # images held at a time while they are scored
THUMBNAIL = 192  # pixels of the longer side
SAMPLES = 16


class ManagedPlacement:
    """Brings scorers to the device as ComfyUI brings models: it may push others out, and be pushed."""

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
    """What ``models/clip_score`` holds, and the choice to go by name instead."""
    return [*weight_files(), BY_NAME]


def weight_files() -> list[str]:
    """What ``models/clip_score`` holds."""
    return folder_paths.get_filename_list(SCORER_FOLDER)


def scorer_path(name: str, called: str = "clip_name") -> Path:
    """Where the weights ``name`` are; ScorerError, naming the input ``called``, if nowhere."""
    found = folder_paths.get_full_path(SCORER_FOLDER, name) if len(name) <= MOST_NAME else None
    if found is None:
        raise ScorerError(
            f"{called}={shown(name)} is not in models/{SCORER_FOLDER}; refresh the list, or copy it there"
        )
    return Path(found)


def load_encoder(
    name: str, architecture: str, allow_download: bool, place: ManagedPlacement
) -> DualEncoder:
    """The dual encoder of a file in ``models/clip_score``, or of open_clip's name."""
    if name == BY_NAME:
        return load_named(architecture.strip(), allow_download, place)
    return load_file(scorer_path(name), architecture.strip(), place, allow_download)


def studies_folder() -> Path:
    """Where the journals of searches are kept."""
    return Path(folder_paths.get_user_directory()) / "qsched" / "studies"


def weights_hash(state: Mapping[str, torch.Tensor], patches: str = "") -> str:
    """SHA-256 (hex) of a sample of every tensor of a state dict, and of a hash of its patches."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            sample = value.detach().flatten()[:SAMPLES].float().cpu().tolist()
            digest.update(f"{name} {list(value.shape)} {sample}\n".encode())
    if patches:
        digest.update(f"patches {patches}\n".encode())
    return digest.hexdigest()


def graph_provenance(model, clip, vae, runner: TrajectoryRunner, objective: Objective) -> dict:
    """Everything that images and scores depend on beside coefficients and prompts: plain JSON."""
    from .host_info import model_info, patches_hash, unpatched_state

    return {
        "model": model_info(model),
        "clip_hash": weights_hash(unpatched_state(clip.patcher), patches_hash(clip.patcher)),
        "vae_hash": weights_hash(vae.first_stage_model.state_dict()),
        "sampling": runner.parameters(),
        "objective": objective.describe(),
    }


class ScoredRunner:
    """Makes images and scores them in parts that fit memory: what ``calibrate`` calls.

    ``thumbnails`` maps each correction of the latest call to uint8 pictures
    [prompts, height, width, 3]; ``images`` to the full ones where ``keep_images`` asks for them.
    """

    def __init__(
        self,
        runner: TrajectoryRunner,
        objective: Objective,
        on_step: Callable[[], None] | None = None,
        keep_images: bool = False,
    ):
        self.runner, self.objective = runner, objective
        self.on_step, self.keep_images = on_step, keep_images
        self.thumbnails: dict[ScalarCorrection, torch.Tensor] = {}
        self.images: dict[ScalarCorrection, torch.Tensor] = {}

    def count(self) -> int:
        """Latents that went through the model so far."""
        return self.runner.model_evaluations

    def __call__(self, corrections: Sequence[ScalarCorrection], prompts: PromptSet) -> list[Scores]:
        picture = self.runner.width * self.runner.height * 3 * 4
        size = max(1, IMAGE_BYTES // (picture * len(corrections)))
        scores: list[list[Scores]] = [[] for _ in corrections]
        small: list[list[torch.Tensor]] = [[] for _ in corrections]
        full: list[list[torch.Tensor]] = [[] for _ in corrections]
        for start in range(0, len(prompts), size):
            part = prompts.part(start, start + size)
            images = self.runner.images(part, list(corrections), self.on_step)
            for index, pictures in enumerate(images):
                comfy.model_management.throw_exception_if_processing_interrupted()
                scores[index].append(self.objective.score(pictures, part.prompts))
                small[index].append(shrink(pictures))
                if self.keep_images:
                    full[index].append(pictures)
        self.thumbnails = dict(zip(corrections, map(torch.cat, small), strict=True))
        if self.keep_images:
            self.images = dict(zip(corrections, map(torch.cat, full), strict=True))
        return [Scores.join(parts) for parts in scores]


def shrink(images: torch.Tensor) -> torch.Tensor:
    """uint8 thumbnails of images [n, height, width, 3] in [0, 1]; small ones stay as they are."""
    x = images.movedim(-1, 1)
    scale = THUMBNAIL / max(x.shape[2:])
    if scale < 1:
        size = [max(1, round(s * scale)) for s in x.shape[2:]]
        x = torch.nn.functional.interpolate(
            x, size, mode="bicubic", antialias=True, align_corners=False
        )
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
