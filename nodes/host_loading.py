"""The loading side of ComfyUI's internals (0.30.0): quantized models, and what a MODEL is."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError

from ..qsched_core.formats import LayerPolicy, get_format, usable_format
from .quant_ops import PREFIX, LoadReport, is_quantized_tensor, quantizing_ops, wrap_stored

logger = logging.getLogger(__name__)

INFO = "qsched"  # the ModelPatcher attachment that holds a model's ModelInfo
FOREIGN = {  # key endings of files that are already quantized, and by what
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".scaled_fp8": "scaled fp8",
    ".qweight": "GPTQ, AWQ or Nunchaku",
}
FIX_SOURCE = "choose the fp16, bf16 or fp32 original"


@dataclass(frozen=True)
class ModelInfo:
    """What a quantized MODEL is: plain data, carried by its patcher and all clones."""

    source: str
    source_hash: str
    format: str
    layers: str
    backend: str
    weight_bytes: int
    unquantized_bytes: int
    summary: str

    def text(self) -> str:
        ratio = self.unquantized_bytes / max(1, self.weight_bytes)
        return (
            f"{self.source}: {self.format}\n"
            f"weights {self.weight_bytes / 1e6:.1f} MB, {ratio:.2f} times smaller than the same in "
            f"16 bits ({self.unquantized_bytes / 1e6:.1f} MB)\n"
            f"layers: {self.summary}\nruns as: {self.backend}"
        )


def checked_policy(weight_format: str, layers: str) -> LayerPolicy:
    """The layer policy of a node's inputs; ValueError if a format can't be used here."""
    policy = LayerPolicy.parse(weight_format, layers)
    for name in policy.formats():
        usable_format(name)
    return policy


def load_checkpoint(name: str, weight_format: str, layers: str = ""):
    """(MODEL, CLIP, VAE) of a checkpoint, the diffusion model quantized while it loads."""
    policy = checked_policy(weight_format, layers)
    path = _path("checkpoints", name)
    model, clip, vae = _load_checkpoint(path, policy)
    if vae is not None:
        vae.patcher.cached_patcher_init = (
            comfy.sd.load_checkpoint_vae_patcher,
            (str(path), folder_paths.get_folder_paths("embeddings")),
        )
    return model, clip, vae


def load_diffusion_model(name: str, weight_format: str, layers: str = ""):
    """MODEL of a diffusion model file, quantized while it loads."""
    return reload_diffusion_model(
        _path("diffusion_models", name), checked_policy(weight_format, layers)
    )


def reload_checkpoint_model(path: Path, policy: LayerPolicy, disable_dynamic: bool = False):
    """``cached_patcher_init`` of a quantized checkpoint's MODEL."""
    return _load_checkpoint(path, policy, disable_dynamic, model_only=True)[0]


def reload_diffusion_model(path: Path, policy: LayerPolicy, disable_dynamic: bool = False):
    """``cached_patcher_init`` of a quantized diffusion model file."""
    state_dict, metadata = _read(path)
    model = _from_state_dict(state_dict, metadata, policy, path.name, disable_dynamic)
    model.cached_patcher_init = (reload_diffusion_model, (path, policy))
    return model


def quantize_model(model, weight_format: str, layers: str = "", disable_dynamic: bool = False):
    """A quantized MODEL made from a loaded one; the input and its patches stay as they are."""
    policy = checked_policy(weight_format, layers)
    state_dict = _unpatched_state_dict(model)
    if any(key.endswith("comfy_quant") for key in state_dict):
        found = model_info(model)["format"]
        raise ValueError(f"model is quantized already ({found}); {FIX_SOURCE}")
    source = model_info(model)["source"]
    fresh = _from_state_dict(state_dict, None, policy, source, disable_dynamic)
    out = model.clone(model_override=fresh.get_clone_model_override())
    out.size = 0  # clone() took it over from the unquantized model
    out.set_attachments(INFO, fresh.attachments[INFO])
    out.cached_patcher_init = (quantize_model, (model, weight_format, layers))
    return out


def model_info(model) -> dict:
    """What a MODEL is, as plain JSON: source, source_hash, format, backend, sizes in bytes.

    ``source_hash`` depends on the unquantized weights alone, so the same model has the same hash in
    every format; ``patches`` tells LoRAs and the like apart.
    """
    info = model.attachments.get(INFO)
    patches = _patches_digest(model)
    if info is not None:
        return {
            "source": info.source, "source_hash": info.source_hash, "format": info.format,
            "layers": info.layers, "backend": info.backend, "weight_bytes": info.weight_bytes,
            "unquantized_bytes": info.unquantized_bytes, "patches": patches,
        }  # fmt: skip
    state_dict = _unpatched_state_dict(model)
    dtype = str(model.model_dtype()).removeprefix("torch.")
    count = sum(tensor.numel() for tensor in state_dict.values())
    return {
        "source": type(model.model.model_config).__name__,
        "source_hash": _content_hash(state_dict),
        "format": f"unquantized {dtype}",
        "layers": "",
        "backend": f"{dtype} on {model.load_device.type}",
        "weight_bytes": _bytes(state_dict),
        "unquantized_bytes": 2 * count,
        "patches": patches,
    }


def _path(folder: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(f"{name!r} is not in models/{folder}; put the file there and refresh")
    return Path(path)


def _read(path: Path) -> tuple[dict, dict | None]:
    """State dict (memory-mapped) and metadata; ValueError names a file that can't be used."""
    if path.suffix == ".gguf":
        raise ValueError(f"{path.name} is quantized already (GGUF); {FIX_SOURCE}")
    try:
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} can't be read ({error}); fetch it again") from None
    for key in state_dict:
        for ending, kind in FOREIGN.items():
            if key.endswith(ending):
                raise ValueError(f"{path.name} is quantized already ({kind}); {FIX_SOURCE}")
    _refuse_fp8(state_dict, path)
    return state_dict, metadata


def _refuse_fp8(state_dict: dict, path: Path) -> None:
    for key, tensor in state_dict.items():
        quantized = key.removesuffix("weight") + "comfy_quant" in state_dict
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and tensor.ndim == 2:
            if not quantized and "weight_scale" not in key:
                raise ValueError(
                    f"{path.name} holds {tensor.dtype} weights ({key}): quantizing them again loses "
                    f"more than either; {FIX_SOURCE}"
                )
            return


@dataclass(frozen=True)
class _Plan:
    """How core would run this model, found before it is loaded."""

    prefix: str
    unet_dtype: torch.dtype
    compute_dtype: torch.dtype


def _plan(state_dict: dict, metadata, name: str) -> _Plan:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    config = comfy.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)
    if config is None and not any(key.startswith(prefix) for key in state_dict):
        prefix = ""
        config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    if config is None:
        raise ValueError(
            f"{name} is no diffusion model that this ComfyUI knows; "
            "a LoRA, VAE or text encoder goes into its own loader"
        )
    supported = list(config.supported_inference_dtypes)
    unet_dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict, prefix),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state_dict, prefix),
    )
    device = comfy.model_management.get_torch_device()
    cast = comfy.model_management.unet_manual_cast(unet_dtype, device, supported)
    return _Plan(prefix, unet_dtype, cast or unet_dtype)


def _options(plan: _Plan, policy: LayerPolicy, report: LoadReport) -> dict:
    ops = quantizing_ops(policy, plan.compute_dtype, report)
    return {"custom_operations": ops, "dtype": plan.unet_dtype}


def _load_checkpoint(path, policy, disable_dynamic=False, model_only=False):
    state_dict, metadata = _read(path)
    state_dict = wrap_stored(state_dict, torch.bfloat16)
    plan, report = _plan(state_dict, metadata, path.name), LoadReport()
    digest = _content_hash(state_dict, plan.prefix)
    out = comfy.sd.load_state_dict_guess_config(
        state_dict,
        output_vae=not model_only,
        output_clip=not model_only,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options=_options(plan, policy, report),
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    if out is None or out[0] is None:
        raise ValueError(f"{path.name} is no checkpoint that this ComfyUI knows")
    model, clip, vae = out[:3]
    _finish(model, path.name, digest, policy, report)
    model.cached_patcher_init = (reload_checkpoint_model, (path, policy))
    return model, clip, vae


def _from_state_dict(state_dict, metadata, policy, source, disable_dynamic):
    state_dict = wrap_stored(state_dict, torch.bfloat16)
    plan, report = _plan(state_dict, metadata, source), LoadReport()
    digest = _content_hash(state_dict, plan.prefix)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options=_options(plan, policy, report),
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise ValueError(f"{source} is no diffusion model that this ComfyUI knows")
    _finish(model, source, digest, policy, report)
    return model


def _finish(model, source: str, digest: str, policy: LayerPolicy, report: LoadReport) -> None:
    """Attach what was loaded to the patcher."""
    if not report.layers:
        raise ValueError(
            f"{source}: no layer was quantized to {policy.format}; check the layers override"
        )
    state_dict = model.model.diffusion_model.state_dict()
    packed = sum(size for _, size, _ in report.layers.values())
    packed16 = sum(full for _, _, full in report.layers.values())
    names = {f"{layer}.{end}" for layer in report.layers for end in ("weight", "comfy_quant")}
    rest = sum(
        2 * tensor.numel()
        for key, tensor in state_dict.items()
        if key not in names and ".weight_" not in key
    )
    counts: dict[str, int] = {}
    for name, _, _ in report.layers.values():
        counts[name] = counts.get(name, 0) + 1
    linear = sum(key.endswith(".weight") and tensor.ndim >= 2 for key, tensor in state_dict.items())
    kept = linear - sum(f"{layer}.weight" in state_dict for layer in report.layers)
    summary = ", ".join(f"{n} {name}" for name, n in counts.items()) + f", {kept} kept"
    formats = [get_format(name) for name in counts]
    info = ModelInfo(
        source=source,
        source_hash=digest,
        format=policy.format,
        layers=";".join(f"{pattern}={name}" for pattern, name in policy.rules),
        backend="; ".join(f.backend(model.load_device) for f in formats),
        weight_bytes=packed + rest,
        unquantized_bytes=packed16 + rest,
        summary=summary,
    )
    model.set_attachments(INFO, info)
    logger.info("%s", info.text())


def _unpatched_state_dict(model) -> dict:
    """The diffusion model's own weights, whether or not patches are baked in at the moment."""
    prefix = "diffusion_model."
    state_dict = dict(model.model.diffusion_model.state_dict())
    for key, saved in model.backup.items():
        if key.startswith(prefix) and key.removeprefix(prefix) in state_dict:
            state_dict[key.removeprefix(prefix)] = saved.weight
    return state_dict


def _bytes(state_dict: dict) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())


def _content_hash(state_dict: dict, prefix: str = "") -> str:
    """Hash of names, shapes and a sample of every weight's values, whatever their float dtype."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key]
        if not key.startswith(prefix) or key.endswith("comfy_quant"):
            continue
        digest.update(f"{key.removeprefix(prefix)}{tuple(tensor.shape)}".encode())
        sample = tensor._qdata if is_quantized_tensor(tensor) else tensor
        sample = sample.detach().reshape(-1)[:16].float().cpu().half()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _patches_digest(model) -> str:
    """Empty without weight patches; else a hash of which layers are patched, and how strongly."""
    if not model.patches:
        return ""
    rows = [
        [key, [[float(patch[0]), float(patch[2])] for patch in patches]]
        for key, patches in sorted(model.patches.items(), key=lambda item: str(item[0]))
    ]
    return hashlib.sha256(json.dumps([str(rows)]).encode()).hexdigest()[:16]


__all__ = [
    "PREFIX",
    "ModelInfo",
    "checked_policy",
    "load_checkpoint",
    "load_diffusion_model",
    "model_info",
    "quantize_model",
]
