"""The loading side of ComfyUI's internals (0.30.0): quantized MODELs, and what a MODEL is made of."""

from __future__ import annotations

import copy
import hashlib
import logging
import pickle
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import safetensors
import torch
from comfy_kitchen.registry import registry as kitchen
from comfy_kitchen.tensor import QuantizedTensor

from ..qsched_core.formats import FormatError, get
from ..qsched_core.formats.files import Entry, check_unquantized, read_header
from ..qsched_core.formats.policy import Policy, parse_overrides
from . import quant_ops

logger = logging.getLogger(__name__)

INFO = "qsched"  # where a MODEL's provenance is in its model_options
HALF = (torch.float16, torch.bfloat16)
SAFETENSORS = (".safetensors", ".sft")
UNQUANTIZED = "none"


@dataclass(frozen=True)
class Request:
    """What the user wants: a format, and overrides by layer name (see ``parse_overrides``)."""

    weight_format: str
    layers: str = ""

    def __post_init__(self):
        get(self.weight_format)
        parse_overrides(self.layers)

    @property
    def policy(self) -> Policy:
        return Policy(self.weight_format, parse_overrides(self.layers))

    def check_device(self, device: torch.device) -> None:
        """FormatError with the reason if a format that is asked for can't run on ``device``."""
        for name in sorted(
            {self.weight_format, *(o.format for o in self.policy.overrides)} - {None}
        ):
            reason = get(name).available(device)
            if reason is not None:
                raise FormatError(f"weight_format={name!r} can't run on {device}: {reason}")


def model_path(folder: str, name: str, label: str) -> str:
    """Where ComfyUI keeps the file; ValueError names the input if it is not there."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{label}={name!r} is not in ComfyUI's {folder} folders "
            f"({', '.join(folder_paths.get_folder_paths(folder))}); refresh the list, or put it there"
        )
    return path


def check_file(path: str, request: Request) -> None:
    """FormatError if the file's header shows that it can't be loaded as asked."""
    suffix = Path(path).suffix.lower()
    if suffix in SAFETENSORS or suffix == ".gguf":
        tensors, metadata = read_header(path)
        with safetensors.safe_open(path, framework="pt") as file:
            _check_tensors(tensors, metadata, request, Path(path).name, file.get_tensor)


def _prefix(keys) -> str:
    """What the diffusion model's keys start with in this file."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(keys)
    return prefix if any(key.startswith(prefix) for key in keys) else ""


def _check_tensors(tensors: Mapping[str, Entry], metadata, request: Request, name, tensor) -> bool:
    """Whether the diffusion model was saved in our formats; FormatError if it can't be loaded."""
    prefix = _prefix(tensors)
    part = {key: entry for key, entry in tensors.items() if key.startswith(prefix)}
    entries = [quant_ops.read_conf(tensor(key)) for key in part if key.endswith(".comfy_quant")]
    formats = {quant_ops.saved_format(entry) for entry in entries}
    if not formats or None in formats:
        check_unquantized(part, metadata, name)
        return False
    if request.weight_format not in formats:
        raise FormatError(
            f"{name} is quantized already, to {' and '.join(sorted(formats))}; set weight_format to "
            "that, or give the fp16 or bf16 file"
        )
    if request.layers.strip():
        raise FormatError(f"layers={request.layers!r}: {name} is quantized already; clear it")
    return True


def _read(path: str, request: Request):
    """State dict (memory-mapped; finished tensors where the file has packed ones) and metadata."""
    name = Path(path).name
    check_file(path, request)
    try:
        sd, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise FormatError(f"{name} can't be read: {error}") from error
    tensors = {k: _entry(v) for k, v in sd.items() if isinstance(v, torch.Tensor)}
    if _check_tensors(tensors, metadata, request, name, sd.get):
        kept = [v.dtype for v in sd.values() if v.dtype in (torch.float32, *HALF) and v.ndim == 1]
        quant_ops.restore_saved(sd, Counter(kept).most_common(1)[0][0] if kept else torch.float16)
    return sd, metadata


def _entry(tensor: torch.Tensor) -> Entry:
    kinds = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    return Entry(kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


class _Load:
    """One loading: the options that core's loaders take, and the provenance they lead to."""

    def __init__(self, path: str, request: Request):
        self.path, self.request = path, request
        self.device = comfy.model_management.get_torch_device()
        request.check_device(self.device)
        self.sd, self.metadata = _read(path, request)
        self.record = quant_ops.LoadRecord()
        prefix = _prefix(self.sd)
        part = [v for k, v in self.sd.items() if k.startswith(prefix)]
        self.unquantized_bytes = sum(v.numel() * v.element_size() for v in part)
        ops = quant_ops.quantized_ops(request.policy, self.record, self.device)
        self.options = {"custom_operations": ops}
        self._keep_half(prefix)

    def _keep_half(self, prefix: str) -> None:
        """Have kept layers stored as in the file where core would widen them to fp32.

        The arithmetic is the same: core casts them to its compute dtype when they run.
        """
        config = comfy.model_detection.model_config_from_unet(
            self.sd, prefix, metadata=self.metadata
        )
        if config is None:
            return
        stored = comfy.utils.weight_dtype(self.sd, prefix)
        count = comfy.utils.calculate_parameters(self.sd, prefix)
        chosen = comfy.model_management.unet_dtype(
            model_params=count,
            supported_dtypes=list(config.supported_inference_dtypes),
            weight_dtype=stored,
        )
        if chosen == torch.float32 and stored in HALF:
            self.options["dtype"] = stored

    def finish(self, model, factory) -> None:
        """Give the MODEL its provenance and its way to be loaded again."""
        name = Path(self.path).name
        if model is None or not self.record.layers:
            raise RuntimeError(
                f"{name} holds no diffusion model that this ComfyUI knows; "
                "is it a LoRA, a text encoder or a VAE?"
            )
        check_matched(self.request.policy, self.record)
        model.cached_patcher_init = (factory, (self.path, self.request))
        model.model_options[INFO] = provenance(
            model,
            self.record,
            self.request,
            source=name,
            source_hash=quant_ops.fingerprint(_samples(model, self.record)),
            unquantized_bytes=self.unquantized_bytes,
        )


def load_diffusion_model(path: str, request: Request, disable_dynamic: bool = False):
    """A MODEL from a file of diffusion_models, quantized while it loads."""
    load = _Load(path, request)
    model = comfy.sd.load_diffusion_model_state_dict(
        load.sd, load.options, metadata=load.metadata, disable_dynamic=disable_dynamic
    )
    load.finish(model, load_diffusion_model)
    return model


def load_checkpoint(path: str, request: Request, model_only=False, disable_dynamic: bool = False):
    """(MODEL, CLIP, VAE) from a checkpoint; only the diffusion model is quantized.

    CLIP and VAE are what ComfyUI's own loader makes of the file.
    """
    load = _Load(path, request)
    embeddings = folder_paths.get_folder_paths("embeddings")
    model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        load.sd,
        output_vae=not model_only,
        output_clip=not model_only,
        embedding_directory=embeddings,
        model_options=load.options,
        metadata=load.metadata,
        disable_dynamic=disable_dynamic,
    ) or (None, None, None, None)
    load.finish(model, load_checkpoint_model)
    if clip is not None and clip.patcher is not None:
        clip.patcher.cached_patcher_init = (
            comfy.sd.load_checkpoint_clip_patcher,
            (path, embeddings),
        )
    if vae is not None and getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_vae_patcher, (path, embeddings))
    return model, clip, vae


def load_checkpoint_model(path: str, request: Request, disable_dynamic: bool = False):
    """The MODEL of ``load_checkpoint`` alone."""
    return load_checkpoint(path, request, model_only=True, disable_dynamic=disable_dynamic)[0]


def quantize_model(model, request: Request, disable_dynamic: bool = False):
    """A new MODEL like ``model`` with its weights quantized; ``model`` itself stays as it is.

    LoRAs on linear layers are merged in full precision before the rounding; all else that was
    patched onto ``model`` is carried over.
    """
    _check_model(model)
    request.check_device(model.load_device)
    base, info = model.model, model_info(model)
    # Weights that an earlier run patched in place go back to what they were.
    comfy.model_management.unload_model_and_clones(model)
    merged: set[str] = set()

    def merge(key: str, weight: torch.Tensor) -> torch.Tensor:
        full = f"diffusion_model.{key}"
        if full not in model.patches:
            return weight
        merged.add(full)
        weight = weight.to(model.load_device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(model.patches[full], weight, full)

    record = quant_ops.LoadRecord()
    ops = quant_ops.quantized_ops(request.policy, record, model.load_device, merge)
    config = type(base.model_config).__new__(type(base.model_config))
    config.__dict__.update(base.model_config.__dict__)  # copy.copy trips over its __getattr__
    config.custom_operations = ops
    config.model_type = lambda *args, **kwargs: base.model_type  # it was detected on loading
    state = dict(base.diffusion_model.state_dict())
    new = config.get_model(state, "", device=model.offload_device)
    new.diffusion_model.load_state_dict(state, strict=False)
    new.model_sampling = copy.deepcopy(base.model_sampling)
    check_matched(request.policy, record)

    out = model.clone(disable_dynamic=disable_dynamic, model_override=(new, ({}, {}, {}, set())))
    out.parent, out.hook_backup, out.size = None, {}, 0
    out.clone_base_uuid, out.patches_uuid = uuid.uuid4(), uuid.uuid4()
    out.patches = {key: p for key, p in out.patches.items() if key not in merged}
    again = model.cached_patcher_init
    out.cached_patcher_init = again and (_quantize_again, (again, model.patches, request))
    out.model_options[INFO] = provenance(
        out,
        record,
        request,
        source=info["source"],
        source_hash=info["source_hash"],
        unquantized_bytes=info["weight_bytes"],
        merged_patches=info["patches"] if merged else "",
    )
    return out


def _quantize_again(init, patches, request: Request, disable_dynamic: bool = False):
    source = init[0](*init[1], disable_dynamic=disable_dynamic)
    if len(init) > 2:
        source = source[init[2]]
    source.patches = patches
    return quantize_model(source, request, disable_dynamic)


def _check_model(model) -> None:
    """FormatError unless every weight of ``model`` is a plain float tensor."""
    for name, parameter in model.model.diffusion_model.named_parameters():
        kind = type(parameter.data).__name__
        if isinstance(parameter.data, QuantizedTensor):
            kind = parameter.data._layout_cls
        elif kind in ("Tensor", "Parameter") and parameter.dtype in (torch.float32, *HALF):
            continue
        else:
            kind = f"{kind} of {parameter.dtype}"
        raise FormatError(
            f"model is quantized already ({name} is {kind}); connect the full-precision model"
        )


def check_matched(policy: Policy, record: quant_ops.LoadRecord) -> None:
    """FormatError if a pattern of the overrides is in no layer's name."""
    unmatched = policy.unmatched(record.layers)
    if unmatched:
        examples = ", ".join(record.layers[:: max(1, len(record.layers) // 4)][:4])
        raise FormatError(
            f"layers: {unmatched[0]!r} matches none of this model's {len(record.layers)} linear "
            f"layers; they have names like {examples}"
        )


def provenance(model, record, request: Request, **rest) -> dict:
    """Plain data that says what ``model`` is made of (bytes are of the diffusion model's weights)."""
    used = Counter(choice.format for choice in record.formats.values())
    return {
        "format": request.weight_format,
        "layers": request.policy.describe(),
        "backend": ", ".join(
            f"{name}: {backend(name, model.load_device)}" for name in sorted(used)
        ),
        "quantized_layers": dict(used),
        "kept_layers": len(record.layers) - sum(used.values()),
        "compute_dtype": str(model.model.get_dtype_inference()).removeprefix("torch."),
        "weight_bytes": weight_bytes(model),
        **rest,
    }


def backend(name: str, device: torch.device) -> str:
    """What runs format ``name`` on ``device``, in words."""
    if name not in quant_ops.NATIVE:
        return get(name).backend(device)
    probe = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
    kernel = kitchen.get_implementation("quantize_int8_rowwise", kwargs={"x": probe})
    return f"comfy-kitchen {kernel.__module__.split('.backends.')[-1].split('.')[0]} {device.type}"


def weight_bytes(model) -> int:
    return comfy.model_management.module_size(model.model.diffusion_model)


def model_info(model) -> dict:
    """Provenance of any MODEL, as plain data.

    source, source_hash (of the weights before quantization; the same file gives the same hash
    quantized or not), format, backend, compute_dtype, weight_bytes, and patches: a hash of the
    LoRAs and the like on it, "" if there are none.
    """
    info = copy.deepcopy(model.model_options.get(INFO))
    if info is None:
        dtype = str(model.model.get_dtype_inference()).removeprefix("torch.")
        quantized = _host_quantization(model)
        info = {
            "source": "",
            "source_hash": quant_ops.fingerprint(_samples(model)),
            "format": quantized or UNQUANTIZED,
            "layers": "",
            "backend": f"{dtype} {model.load_device.type}",
            "compute_dtype": dtype,
            "weight_bytes": weight_bytes(model),
            "unquantized_bytes": weight_bytes(model),
        }
    return info | {"patches": _patches_hash(model)}


def _host_quantization(model) -> str:
    """The formats of a model that something else quantized, "" if nothing did."""
    kinds = set()
    for parameter in model.model.diffusion_model.parameters():
        if isinstance(parameter.data, QuantizedTensor):
            kinds.add(parameter.data._layout_cls)
        elif parameter.ndim > 1 and parameter.dtype not in (torch.float32, *HALF):
            kinds.add(str(parameter.dtype).removeprefix("torch."))
    return "+".join(sorted(kinds))


def _samples(model, record: quant_ops.LoadRecord | None = None) -> dict[str, bytes]:
    """Samples of the weights of two and more dimensions, as they were before patches."""
    samples = dict(record.samples) if record is not None else {}
    for key, value in model.model.diffusion_model.named_parameters():
        if key in samples or value.ndim < 2:
            continue
        backup = model.backup.get(f"diffusion_model.{key}")
        value = value.data if backup is None else backup.weight
        samples[key] = quant_ops.weight_sample(value)
    return samples


def _patches_hash(model) -> str:
    if not model.patches:
        return ""
    digest = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        digest.update(str(key).encode())
        for strength, value, strength_model, *_ in model.patches[key]:
            digest.update(f"{strength} {strength_model}".encode())
            for tensor in _tensors(getattr(value, "weights", value)):
                digest.update(quant_ops.weight_sample(tensor))
    return digest.hexdigest()[:32]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def describe(info: Mapping) -> str:
    """What ran, and what it saved, for a node's text output."""
    before, after = info["unquantized_bytes"], info["weight_bytes"]
    layers = ", ".join(f"{count} in {name}" for name, count in info["quantized_layers"].items())
    text = (
        f"{info['source'] or 'model'}: {info['format']}\n"
        f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({before / max(after, 1):.2f}x smaller)\n"
        f"linear layers: {layers or 'none quantized'}; {info['kept_layers']} kept\n"
        f"runs on {info['backend'] or 'torch'}, computes in {info['compute_dtype']}"
    )
    return text + (f"\nlayers: {info['layers']}" if info["layers"] else "")
