"""Saving quantized MODELs as ComfyUI (0.30.0) saves its own: whole files or none."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import SafetensorError

from ....qsched_core.files import check_prefix, check_room, write_whole
from ....qsched_core.formats import FormatError, get
from ....qsched_core.formats.layer_entry import SUFFIX
from ....qsched_core.workspace import remove_abandoned
from . import layouts, loras
from .loading import METADATA, merge_patches
from .provenance import INFO, model_info, rounded_again

VERSION = 1  # version of the provenance in a file


def save_model(
    model,
    path: str | Path | Iterable[Path],
    clip=None,
    vae=None,
    merge_loras: bool = True,
    extra=None,
) -> tuple[Path, dict]:
    """Write ``model``, with ``clip`` and ``vae`` as a checkpoint; its path and its provenance.

    A ``path`` is replaced; of several the first that is free when the file is finished is taken, and
    no other server gets the same.  LoRAs are merged into the weights or left out; calibrated layers
    lose their calibration where one is merged.  FormatError for a
    MODEL that is not quantized by this pack, DiskError where the disk refuses; neither leaves a file.
    """
    if INFO not in model.model_options:
        raise FormatError(
            "model is not quantized by this pack; quantize it first, or save it with ComfyUI's own "
            "Save Model"
        )
    if clip is not None and INFO in clip.patcher.model_options:
        raise FormatError(
            "clip is quantized, and ComfyUI's checkpoint loader could not open it; connect the "
            "unquantized text encoder, and quantize it after loading"
        )
    overwrite = isinstance(path, str | Path)
    paths = iter([Path(path)] if overwrite else path)
    first = next(paths)
    modules = [model.model, *(p.patcher.model for p in (clip, vae) if p is not None)]
    needed = sum(comfy.model_management.module_size(m) for m in modules)
    remove_abandoned(first.parent)
    check_room(first, needed)
    if model.patches and merge_loras:
        model = merge_patches(model)
    elif model.patches:
        model = model.clone()
        model.patches, model.patches_uuid = {}, uuid.uuid4()
    provenance, again = model_info(model), loras.patched(model)
    if model.patches:
        provenance["merged_patches"] = provenance["patches"]
    if again:
        provenance["rounding"] = rounded_again(provenance["rounding"], len(again))
    provenance = {"version": VERSION, **provenance, "kind": file_kind(provenance)}
    metadata = {METADATA: json.dumps(provenance), "format": "pt", **(extra or {})}
    keys = _extra_keys(model, alone=clip is None and vae is None) | _entries(model, again)

    def write(place: Path) -> None:
        try:
            comfy.utils.save_torch_file(
                _state_dict(model, clip, vae) | keys, str(place), metadata=metadata
            )
        except SafetensorError as error:
            raise _system_error(error) from error
        with open(place, "rb+") as file:
            os.fsync(file.fileno())

    return write_whole(write, chain([first], paths), needed, overwrite), provenance


def _state_dict(model, clip, vae) -> dict[str, torch.Tensor]:
    """What ComfyUI's ``save_checkpoint`` writes of them, with the LoRAs of ``model`` merged.

    That function itself fails on most models here.  It makes a parameter of each weight that is not
    loaded whole, and torch makes none of integers, which codes are.
    """
    # What is loaded may have patches in it, of this MODEL or of a clone, or another dtype.
    for patcher in (model, getattr(vae, "patcher", None)):
        if patcher is not None:
            comfy.model_management.unload_model_and_clones(patcher)
    prefix = "diffusion_model."
    weights = model.model.diffusion_model.state_dict()
    for key in model.patches:
        name = key.removeprefix(prefix)
        if name == key or name not in weights:
            continue
        weight = model.patch_weight_to_device(key, model.load_device, return_weight=True)
        parts = weight.state_dict(name) if isinstance(weight, QuantizedTensor) else {name: weight}
        weights |= {n: part.to("cpu") for n, part in parts.items() if n in weights}
    texts = None
    if clip is not None:
        clip.load_model()
        texts = clip.state_dict_for_saving()
    pixels = None if vae is None else vae.get_sd()
    state = model.model.state_dict_for_saving(
        weights, clip_state_dict=texts, vae_state_dict=pixels, clip_vision_state_dict=None
    )
    return {key: value.contiguous() for key, value in state.items()}


def _system_error(error: SafetensorError) -> OSError:
    """The OSError that the library tells in its words."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(str(error))
    number = int(found[1])
    if os.name == "nt":
        return OSError(0, str(error), None, number)
    return OSError(number, os.strerror(number))


def next_paths(prefix: str) -> Iterator[Path]:
    """The next free file of this name in ComfyUI's output folder, as often as it is asked.

    ValueError if it is outside, or no name for a file.
    """
    check_prefix(prefix)
    output = folder_paths.get_output_directory()
    while True:
        try:
            folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, output)
        except Exception as error:  # the host raises it bare
            raise ValueError(f"filename_prefix={prefix!r}: {error}") from error
        yield Path(folder) / f"{name}_{counter:05}_.safetensors"


def workflow_metadata(hidden) -> dict[str, str]:
    """The workflow that made the file, as ComfyUI writes it, unless the user turned that off."""
    if args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def file_kind(provenance: dict) -> str:
    """ "native" if plain ComfyUI opens a file of this model, "extended" if this pack alone does."""
    kinds = {get(name).file_kind for name in provenance["quantized_layers"]}
    return "extended" if "extended" in kinds else "native"


def _entries(model, again: Collection[str]) -> dict[str, torch.Tensor]:
    """The layers' entries, with what ComfyUI's own loaders are to say of them, by key in the file.

    Layers of ``again`` are rounded again with their LoRAs.
    """
    state = model.model.diffusion_model.state_dict()
    entries = {
        k: layouts.with_hint(v, k.removesuffix(SUFFIX) in again)
        for k, v in state.items()
        if k.endswith(SUFFIX)
    }
    return model.model.model_config.process_unet_state_dict_for_saving(entries)


def _extra_keys(model, alone: bool) -> dict[str, torch.Tensor]:
    """The keys beside the weights that tell ComfyUI's loaders how the model predicts.

    For a model ``alone`` they are also written under the weights' prefix: ComfyUI's Load Diffusion
    Model reads no other keys of a file.
    """
    sampling = model.get_model_object("model_sampling")
    keys = {}
    if isinstance(
        sampling, comfy.model_sampling.EDM
    ):  # before V_PREDICTION, which is its base class
        form = model.get_model_object("latent_format")
        if isinstance(form, comfy.latent_formats.SDXL_Playground_2_5):
            keys = {"edm_mean": form.latents_mean, "edm_std": form.latents_std}
    elif isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
            keys = {f"edm_vpred.{n}": getattr(sampling, n) for n in ("sigma_max", "sigma_min")}
        elif isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
            keys = {"v_pred": torch.tensor([])}
            if getattr(sampling, "zsnr", False):
                keys["ztsnr"] = torch.tensor([])
    keys = {key: torch.as_tensor(value).float().clone() for key, value in keys.items()}
    prefixed = {f"model.diffusion_model.{k}": v.clone() for k, v in keys.items()} if alone else {}
    return keys | prefixed
