"""Weight files on ComfyUI's side (0.30.0): found, checked, and read without loading them."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.utils
import folder_paths
import torch

from ....qsched_core.formats import FormatError
from ....qsched_core.formats.files import DTYPES, Entry, MappedFile, check_unquantized
from ....qsched_core.formats.layer_entry import SUFFIX, read_entry
from ....qsched_core.formats.policy import Policy
from ....qsched_core.text import plain, shown
from ..folders import is_name
from . import layouts

HALF = (torch.float16, torch.bfloat16)
SAFETENSORS = (".safetensors", ".sft")
# Keys that say how an SDXL model predicts: its weights do not show it.
PREDICTION = (
    "v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std",
)  # fmt: skip


def weight_files(folder: str) -> list[str]:
    """What ComfyUI's ``folder`` of models holds."""
    return folder_paths.get_filename_list(folder)


def model_path(folder: str, name: str, label: str) -> str:
    """Where ComfyUI keeps the file; ValueError names the input if it is not there."""
    path = folder_paths.get_full_path(folder, name) if is_name(name) else None
    if path is None:
        raise ValueError(
            f"{label}={shown(name)} is not in ComfyUI's {folder} folders "
            f"({', '.join(folder_paths.get_folder_paths(folder))}); refresh the list, or put it there"
        )
    return path


@dataclass(frozen=True)
class WeightFile:
    """The state dict of a file, its metadata, and the mapping its tensors are views of, if any.

    ``prefix`` is what the diffusion model's keys start with.
    """

    name: str
    state: dict[str, torch.Tensor]
    metadata: Mapping[str, str] | None
    prefix: str
    mapped: MappedFile | None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The diffusion model's part."""
        return {k: v for k, v in self.state.items() if k.startswith(self.prefix)}

    def with_prediction(self) -> dict[str, torch.Tensor]:
        """``state`` with the checkpoint's prediction keys (v_pred, ...) copied under ``prefix``.

        Where ComfyUI loads the diffusion model alone it drops all keys outside ``prefix``.  Without
        the copies it would take the model for epsilon.
        """
        found = {k: self.state[k] for k in PREDICTION if k in self.state}
        return {self.prefix + k: v for k, v in found.items()} | self.state


def read_file(path: str, weight_format: str, layers: str) -> WeightFile:
    """Open a weight file, memory-mapped; packed weights become quantized tensors.

    FormatError if it can't be read, or can't be loaded as asked.
    """
    name, mapped = Path(path).name, None
    if Path(path).suffix.lower() in (*SAFETENSORS, ".gguf"):
        mapped = MappedFile(path)
        sd, metadata = mapped.state_dict(), mapped.metadata
    else:
        try:
            sd, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        except (ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise FormatError(f"{name} can't be read: {error}") from error
    entries = {k: _entry(v) for k, v in sd.items() if isinstance(v, torch.Tensor)}
    if _check_tensors(entries, metadata, weight_format, layers, name, sd.get):
        kept = [v.dtype for v in sd.values() if v.dtype in (torch.float32, *HALF) and v.ndim == 1]
        dtype = Counter(kept).most_common(1)[0][0] if kept else torch.float16
        layouts.restore_saved(sd, dtype, name)
    return WeightFile(name, sd, metadata, prefix_of(sd), mapped)


def _layer_names(state: Mapping, metadata, prefix: str) -> Mapping[str, str]:
    """The kinds of a file's layers by name.

    Empty for files whose layers ComfyUI renames (diffusers' names): those are checked after
    loading.
    """
    if comfy.model_detection.model_config_from_unet(state, prefix, metadata=metadata) is None:
        return {}
    kinds = {2: "linear", 4: "conv2d"}
    return {
        key.removeprefix(prefix).removesuffix(".weight"): kinds[value.ndim]
        for key, value in state.items()
        if key.startswith(prefix) and key.endswith(".weight") and value.ndim in kinds
    }


def check_names(state: Mapping, metadata, prefix: str, policy: Policy) -> None:
    """FormatError if a pattern of the overrides matches no layer; nothing is loaded for this."""
    check_matched(policy, _layer_names(state, metadata, prefix))


def check_matched(policy: Policy, layers: Mapping[str, str]) -> None:
    """FormatError if a pattern of the overrides matches none of ``layers`` (kinds by name)."""
    unmatched = policy.unmatched(layers) if layers else []
    if unmatched:
        names = list(layers)
        examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
        raise FormatError(
            f"layers: {shown(unmatched[0])} matches none of this model's {len(names)} layers; they have "
            f"names like {plain(examples, 400)}"
        )


def _entry(tensor: torch.Tensor) -> Entry:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Entry(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def prefix_of(keys) -> str:
    """What the diffusion model's keys start with in this file."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(keys)
    return prefix if any(key.startswith(prefix) for key in keys) else ""


def _check_tensors(
    tensors: Mapping[str, Entry], metadata, weight_format: str, layers: str, name: str, tensor
) -> bool:
    """Whether the diffusion model was saved in our formats; FormatError if it can't be loaded."""
    prefix = prefix_of(tensors)
    part = {key: entry for key, entry in tensors.items() if key.startswith(prefix)}
    entries = {key: read_entry(tensor(key), key, name) for key in part if key.endswith(SUFFIX)}
    known = {key: layouts.saved_format(entry) for key, entry in entries.items()}
    formats = set(known.values())
    if None in formats and len(formats) > 1:
        odd = next(key for key, found in known.items() if found is None)
        raise FormatError(
            f"{name}: layer {shown(odd.removesuffix(SUFFIX))} is in format "
            f"{shown(entries[odd].get('format', ''), 60)}, unknown here; open the file with ComfyUI's "
            "own loader, or give the fp16 or bf16 file"
        )
    if not formats or None in formats:
        check_unquantized(part, metadata, name)
        return False
    if weight_format not in formats:
        raise FormatError(
            f"{name} is quantized already, to {' and '.join(sorted(formats))}; set weight_format to "
            "that, or give the fp16 or bf16 file"
        )
    if layers.strip():
        raise FormatError(f"layers={shown(layers)}: {name} is quantized already; clear it")
    return True
