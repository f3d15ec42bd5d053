"""Quantized MODELs: ComfyUI's loaders (0.30.0), run with operations that quantize."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_kitchen.tensor import QuantizedTensor

from ....qsched_core.formats import FormatError, get
from ....qsched_core.formats.policy import Choice, Policy, parse_overrides
from ....qsched_core.rounding import RoundedWeights
from . import loras
from .damage import named, said_of_itself
from .files import HALF, check_matched, check_names, read_file
from .ops import LoadRecord, quantized_ops
from .provenance import (
    INFO,
    model_info,
    patches_hash,
    provenance,
    rounding_facts,
    source_hash,
)

METADATA = "qsched"  # the key of a saved file's metadata that holds its provenance, as JSON
KEPT_FACTS = ("format", "rounding")  # what a file says of itself
FORCED_DTYPES = ("fp32_unet", "fp64_unet", "fp16_unet", "bf16_unet", "force_fp32")


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

    def check_device(self, device: torch.device | None = None) -> None:
        """FormatError with the reason if a format of the request can't run on ``device``.

        None: the device on which ComfyUI runs its models.
        """
        if device is None:
            device = comfy.model_management.get_torch_device()
        for name in self.policy.formats():
            reason = get(name).available(device)
            if reason is not None:
                raise FormatError(f"weight_format={name!r} can't run on {device}: {reason}")


def cpu_compute_dtype() -> torch.dtype | None:
    """bf16 if this CPU multiplies it faster than fp32, else None; None too if the user chose a dtype.

    ComfyUI by itself computes in fp32 on every CPU.
    """
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    told = any(getattr(args, name, False) for name in FORCED_DTYPES)
    return torch.bfloat16 if fast and not told else None


def _compute_in(model, config) -> None:
    """Let a freshly loaded model (a BaseModel) compute in bf16 where that is faster."""
    dtype = cpu_compute_dtype()
    if dtype is not None and dtype in config.supported_inference_dtypes:
        model.manual_cast_dtype = dtype


def watch(record: LoadRecord, total: int, drawn: bool = True) -> None:
    """Stop when the user says so; ``drawn``: show ``total`` layers' progress on the node that runs."""
    bar = comfy.utils.ProgressBar(total) if drawn else None

    def progress():
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bar is not None:
            bar.update(1)

    record.progress = progress


def merger(patches: Mapping, device: torch.device, prefix: str, merged: set[str]) -> Callable:
    """A function for ``quantized_ops`` that merges ``patches`` into a weight in full precision.

    It adds the keys that it merged to ``merged``.
    """

    def merge(key: str, weight: torch.Tensor) -> torch.Tensor:
        full = prefix + key
        if full not in patches:
            return weight
        merged.add(full)
        weight = weight.to(device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches[full], weight, full)

    return merge


class _Load:
    """One run of a loader: the options that ComfyUI's loaders take, and the provenance of the result."""

    def __init__(self, path: str, request: Request, patches: Mapping | None = None):
        self.path, self.request, self.patches = path, request, patches or {}
        device = comfy.model_management.get_torch_device()
        request.check_device(device)
        self.file = read_file(path, request.weight_format, request.layers)
        with named(self.file.name):
            check_names(self.file.state, self.file.metadata, self.file.prefix, request.policy)
        weights = self.file.weights
        self.unquantized_bytes = sum(v.numel() * v.element_size() for v in weights.values())
        self.record = LoadRecord(file=self.file.mapped)
        watch(self.record, sum(v.ndim in (2, 4) for v in weights.values()))
        _make_room(device, weights)
        self.merged: set[str] = set()
        merge = merger(self.patches, device, "diffusion_model.", self.merged)
        ops = quantized_ops(request.policy, self.record, device, merge if self.patches else None)
        self.options = {"custom_operations": ops}
        self.before = said_of_itself(self.file.metadata, METADATA, self.file.name)
        with named(self.file.name):
            self._keep_half()

    def _keep_half(self) -> None:
        """Keep unquantized layers in the file's dtype where ComfyUI would widen them to fp32.

        The arithmetic is the same: ComfyUI casts them to its compute dtype when they run.
        """
        prefix, state = self.file.prefix, self.file.state
        config = comfy.model_detection.model_config_from_unet(
            state, prefix, metadata=self.file.metadata
        )
        if config is None:
            return
        stored = comfy.utils.weight_dtype(state, prefix)
        chosen = comfy.model_management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state, prefix),
            supported_dtypes=list(config.supported_inference_dtypes),
            weight_dtype=stored,
        )
        if chosen == torch.float32 and stored in HALF:
            self.options["dtype"] = stored

    def finish(self, model, factory) -> None:
        """Give the MODEL its provenance, and the call with which ComfyUI loads it again."""
        if model is None or not self.record.choices:
            raise RuntimeError(
                f"{self.file.name} holds no diffusion model that this ComfyUI knows; "
                "is it a LoRA, a text encoder or a VAE?"
            )
        check_matched(self.request.policy, self.record.kinds)
        _own_memory(model.model.diffusion_model, self.record)
        _check_kept(model.model.diffusion_model, self.file.name)
        if comfy.model_management.is_device_cpu(model.load_device):
            _compute_in(model.model, model.model.model_config)
        model.cached_patcher_init = (factory, (self.path, self.request, self.patches))
        model.patches = {k: p for k, p in self.patches.items() if k not in self.merged}
        before = self.before
        model.model_options[INFO] = provenance(
            model,
            self.record,
            self.request,
            source=before.get("source") or self.file.name,
            source_hash=before.get("source_hash") or source_hash(model, self.record),
            unquantized_bytes=before.get("unquantized_bytes") or self.unquantized_bytes,
            merged_patches=before.get("merged_patches") or "",
        )
        model.model_options[INFO] |= {k: before[k] for k in KEPT_FACTS if k in before}
        loras.at_run_time(model)


def _own_memory(module: torch.nn.Module, record: LoadRecord) -> None:
    """Copy tensors that are still views of the mapped file into memory, one at a time."""
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.data
        own = record.own(value)
        if own is not value:
            tensor.data = own


def _check_kept(module: torch.nn.Module, name: str) -> None:
    """FormatError if a weight that was not quantized has NaN or infinite values, or is of integers."""
    for key, parameter in module.named_parameters():
        plain = not isinstance(parameter.data, QuantizedTensor) and not parameter.is_meta
        if plain and not parameter.is_floating_point():
            raise FormatError(
                f"{name}: {key} is of {parameter.dtype}, and nothing in the file says what its "
                "numbers mean; get the file again"
            )
        if plain and not torch.isfinite(parameter).all():
            raise FormatError(
                f"{name}: {key} has NaN or infinite values; the file is damaged or its half "
                "precision overflowed: use a sound copy"
            )


def _make_room(device: torch.device, weights: Mapping[str, torch.Tensor]) -> None:
    """Ask the host to free what quantizing the largest layer takes on ``device``."""
    if device.type != "cpu" and weights:
        largest = max(v.numel() for v in weights.values())
        comfy.model_management.free_memory(8 * largest + (512 << 20), device)


def load_diffusion_model(
    path: str, request: Request, patches: Mapping | None = None, disable_dynamic: bool = False
):
    """A MODEL from a file of diffusion_models, quantized while it loads.

    ``patches`` (a MODEL's) on quantized layers are merged before the rounding; the others stay
    patches.
    """
    load = _Load(path, request, patches)
    with named(load.file.name):
        model = comfy.sd.load_diffusion_model_state_dict(
            load.file.with_prediction(),
            load.options,
            metadata=load.file.metadata,
            disable_dynamic=disable_dynamic,
        )
    load.finish(model, load_diffusion_model)
    return model


def load_checkpoint(
    path: str,
    request: Request,
    patches: Mapping | None = None,
    model_only: bool = False,
    disable_dynamic: bool = False,
):
    """(MODEL, CLIP, VAE) from a checkpoint; only the diffusion model is quantized.

    CLIP and VAE are what ComfyUI's own loader makes of the file.
    """
    load = _Load(path, request, patches)
    embeddings = folder_paths.get_folder_paths("embeddings")
    with named(load.file.name):
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            load.file.state,
            output_vae=not model_only,
            output_clip=not model_only,
            embedding_directory=embeddings,
            model_options=load.options,
            metadata=load.file.metadata,
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


def load_checkpoint_model(
    path: str, request: Request, patches: Mapping | None = None, disable_dynamic: bool = False
):
    """The MODEL of ``load_checkpoint`` alone."""
    return load_checkpoint(path, request, patches, True, disable_dynamic)[0]


def quantize_model(
    model,
    request: Request,
    disable_dynamic: bool = False,
    rounded: RoundedWeights | None = None,
    drawn: bool = True,
):
    """A new MODEL like ``model`` with its weights quantized; ``model`` itself stays as it is.

    LoRAs on quantized layers are merged in full precision before the rounding.  All other patches
    of ``model`` are carried over.  Layers of ``rounded`` take its weights; LoRAs are in them.
    ``drawn``: the node that runs shows how far it is.
    """
    check_model(model)
    request.check_device(model.load_device)
    base, info = model.model, model_info(model)
    # An earlier run may have patched weights in place: unloading restores them.
    comfy.model_management.unload_model_and_clones(model)
    merged: set[str] = set()
    state = dict(base.diffusion_model.state_dict())
    record = LoadRecord()
    watch(record, sum(v.ndim in (2, 4) for v in state.values()), drawn)
    merge = merger(model.patches, model.load_device, "diffusion_model.", merged)
    policy = request.policy
    if rounded is not None:
        policy = partial(_chosen, rounded, policy)
        merged |= {f"diffusion_model.{n}.{p}" for n in rounded.layers for p in ("weight", "bias")}
    ops = quantized_ops(policy, record, model.load_device, merge, rounded)
    config = type(base.model_config).__new__(type(base.model_config))
    config.__dict__.update(base.model_config.__dict__)  # copy.copy fails on its __getattr__
    config.custom_operations = ops
    kept = _narrowest(state)
    if kept is not None:  # ComfyUI widened them: it computes in what it chose, as before
        config.unet_config = {**base.model_config.unet_config, "dtype": kept}
        config.manual_cast_dtype = base.get_dtype_inference()
    config.model_type = lambda *args, **kwargs: base.model_type  # it was detected on loading
    new = config.get_model(state, "", device=model.offload_device)
    new.diffusion_model.load_state_dict(state, strict=False)
    new.model_sampling = copy.deepcopy(base.model_sampling)
    if comfy.model_management.is_device_cpu(model.load_device):
        _compute_in(new, config)
    check_matched(request.policy, record.kinds)

    out = clone_with(model, new, disable_dynamic)
    out.patches = {key: p for key, p in out.patches.items() if key not in merged}
    again = model.cached_patcher_init
    out.cached_patcher_init = again and (_quantize_again, (again, model.patches, request, rounded))
    out.model_options[INFO] = provenance(
        out,
        record,
        request,
        source=info["source"],
        source_hash=info["source_hash"],
        unquantized_bytes=info["weight_bytes"],
        merged_patches=info["patches"] if merged else "",
    )
    if rounded is not None:
        # Of a mix the request's own format is one of several.
        out.model_options[INFO]["format"] = rounded.provenance.get("format", request.weight_format)
        out.model_options[INFO]["rounding"] = rounding_facts(rounded)
    loras.at_run_time(out)
    return out


def _narrowest(state: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The 16-bit dtype that holds every fp32 value of ``state`` exactly; None if there is none."""
    wide = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dtype == torch.float32]
    for dtype in HALF if wide else ():
        if all(torch.equal(value.to(dtype).float(), value) for value in wide):
            return dtype
    return None


def _chosen(rounded: RoundedWeights, policy: Policy, name: str, shape, kind: str) -> Choice:
    return rounded.chosen[name] if name in rounded.layers else policy(name, shape, kind)


def clone_with(patcher, module, disable_dynamic: bool = False):
    """A clone of ``patcher`` around another ``module`` of the same structure."""
    out = patcher.clone(
        disable_dynamic=disable_dynamic, model_override=(module, ({}, {}, {}, set()))
    )
    out.parent, out.hook_backup, out.size = None, {}, 0
    out.clone_base_uuid, out.patches_uuid = uuid.uuid4(), uuid.uuid4()
    return out


def load_again(init, patches, disable_dynamic: bool = False):
    """The unquantized model, loaded once more from its source, with its patches."""
    source = init[0](*init[1], disable_dynamic=disable_dynamic)
    if len(init) > 2:
        source = source[init[2]]
    source.patches = patches
    return source


def _quantize_again(init, patches, request: Request, rounded=None, disable_dynamic: bool = False):
    model = load_again(init, patches, disable_dynamic)
    return quantize_model(model, request, disable_dynamic, rounded)


def merge_patches(model):
    """``model`` with its LoRAs merged into the quantized weights.

    The source file is read again: LoRAs are merged in full precision, and rounded once.  Where it is
    gone this is ``model`` itself; ComfyUI then rounds the patches into the quantized weights when it
    saves.
    """
    factory, values = (*(model.cached_patcher_init or (None, ())),)[:2]
    if factory not in (load_diffusion_model, load_checkpoint_model) or not model.patches:
        return model
    if not Path(values[0]).is_file():
        return model
    out = factory(values[0], values[1], model.patches)
    out.model_options[INFO]["merged_patches"] = patches_hash(model)
    return out


def check_model(model) -> None:
    """FormatError unless every weight of ``model`` is a plain float tensor."""
    for name, parameter in model.model.diffusion_model.named_parameters():
        check_plain(name, parameter, "model")


def check_plain(name: str, parameter: torch.nn.Parameter, label: str) -> None:
    """FormatError, which names the input ``label``, unless a weight is a plain float tensor."""
    found = type(parameter.data).__name__
    if isinstance(parameter.data, QuantizedTensor):
        found = parameter.data._layout_cls
    elif found in ("Tensor", "Parameter") and parameter.dtype in (torch.float32, *HALF):
        return
    else:
        found = f"{found} of {parameter.dtype}"
    raise FormatError(
        f"{label} is quantized already ({name} is {found}); connect the full-precision one"
    )
