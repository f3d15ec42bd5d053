"""Quantized text encoders: a CLIP of ComfyUI (0.30.0) with packed weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import comfy.model_management
import torch

from . import loras
from .files import check_matched
from .loading import Request, check_plain, clone_with, load_again, merger, watch
from .ops import LoadRecord, quantized_ops
from .provenance import INFO, quantization

# What ComfyUI's dynamic loading notes on a layer, and makes again when it is missing.
LOADED = {
    "_v", "_v_block", "_v_block_faulted", "_v_weight", "_v_bias", "_v_signature", "_pin_state",
    "_pins", "_prefetch", "weight_lowvram_function", "bias_lowvram_function",
}  # fmt: skip


def quantize_text_encoder(clip, request: Request):
    """A new CLIP like ``clip`` whose linear layers are quantized; ``clip`` itself stays as it is.

    The layers run weight-only, in the precision in which ComfyUI encodes text: each prompt is
    encoded only once.  LoRAs on them are merged in full precision before the rounding.  FormatError if it is
    quantized already, or can't be quantized as asked.
    """
    out = clip.clone()
    out.patcher = _quantize_patcher(clip.patcher, request)
    out.cond_stage_model = out.patcher.model
    return out


def _quantize_patcher(patcher, request: Request, disable_dynamic: bool = False):
    for name, parameter in patcher.model.named_parameters():
        check_plain(name, parameter, "clip")
    request.check_device(patcher.load_device)
    # An earlier run may have patched weights in place: unloading restores them.
    comfy.model_management.unload_model_and_clones(patcher)
    linears = {n: m for n, m in patcher.model.named_modules() if isinstance(m, torch.nn.Linear)}
    record, merged = LoadRecord(), set()
    watch(record, len(linears))
    merge = merger(patcher.patches, patcher.load_device, "", merged)
    policy = replace(request.policy, weight_only=True)
    ops = quantized_ops(policy, record, patcher.load_device, merge)
    shared: dict[int, object] = {}
    for tensor in (*patcher.model.parameters(), *patcher.model.buffers()):
        again = tensor.data
        if isinstance(tensor, torch.nn.Parameter):
            again = torch.nn.Parameter(again, requires_grad=tensor.requires_grad)
        shared[id(tensor)] = again
    for name, linear in linears.items():
        new = _quantized(ops, linear, name)
        if new.stored is not None:
            shared[id(linear)] = new
    check_matched(policy, record.kinds)
    # A copy of the module tree with quantized layers; all other tensors are shared with the original.
    out = clone_with(patcher, _copied(patcher.model, shared), disable_dynamic)
    kept = {n for n, c in record.choices.items() if c.format is None}
    merged -= {f"{name}.weight" for name in kept}
    out.patches = {key: p for key, p in out.patches.items() if key not in merged}
    loras.at_run_time(out)
    again = patcher.cached_patcher_init
    out.cached_patcher_init = again and (_quantize_again, (again, patcher.patches, request))
    out.model_options[INFO] = {
        **quantization(record, request, patcher.load_device),
        "source": "text encoder",
        "compute_dtype": "float32",
        "unquantized_bytes": comfy.model_management.module_size(patcher.model),
        "weight_bytes": comfy.model_management.module_size(out.model),
    }
    return out


def _copied(model: torch.nn.Module, memo: dict[int, object]) -> torch.nn.Module:
    """A deep copy of ``model`` without what ComfyUI's dynamic loading holds of it on a GPU.

    That is handles of the driver, each of which is freed once; the copy gets its own when it is loaded.
    """
    for name, empty in (("dynamic_vbars", {}), ("dynamic_pins", {}), ("dynamic_patchers", set())):
        if hasattr(model, name):
            memo[id(getattr(model, name))] = empty
    for module in model.modules():
        notes = [value for name, value in vars(module).items() if name in LOADED]
        # Not True: there is one, and other attributes have it too.
        memo |= {id(note): None for note in notes if not isinstance(note, bool)}
    out = copy.deepcopy(model, memo)
    for module in out.modules():
        for name in LOADED & vars(module).keys():
            delattr(module, name)
    return out


def _quantized(ops, linear: torch.nn.Linear, name: str):
    """``linear`` as a layer of ``ops``, quantized if their policy says so."""
    weight, bias = linear.weight, linear.bias
    new = ops.Linear(
        linear.in_features, linear.out_features, bias is not None, weight.device, weight.dtype
    )
    state = {f"{name}.weight": weight.data}
    if bias is not None:
        state[f"{name}.bias"] = bias.data
    new._load_from_state_dict(state, f"{name}.", {}, True, [], [], [])
    for key in ("weight", "bias"):  # the dtype that ComfyUI's dynamic loading casts to
        dtype = getattr(linear, f"{key}_comfy_model_dtype", None)
        if dtype is not None:
            setattr(new, f"{key}_comfy_model_dtype", dtype)
    return new


def _quantize_again(init, patches, request: Request, disable_dynamic: bool = False):
    return _quantize_patcher(load_again(init, patches, disable_dynamic), request, disable_dynamic)
