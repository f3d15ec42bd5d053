"""What a MODEL of ComfyUI (0.30.0) is made of: provenance, and a report by layer."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ....qsched_core.formats import get
from ....qsched_core.formats.report import LayerRow
from ....qsched_core.rounding import RoundedWeights
from ....qsched_core.text import markdown
from .files import HALF
from .ops import LoadRecord, fingerprint, weight_sample

INFO = "qsched"  # the key of a MODEL's model_options that holds its provenance
UNQUANTIZED = "none"
SAMPLES = 16  # values of each weight that go into a hash


def quantization(record: LoadRecord, request, device: torch.device) -> dict:
    """Plain data: the request, and the format of each layer."""
    used = Counter(c.format for c in record.choices.values() if c.format is not None)
    kept = Counter(c.why for c in record.choices.values() if c.format is None)
    convolutions = [
        n for n, c in record.choices.items() if c.format and record.kinds[n] == "conv2d"
    ]
    return {
        "format": request.weight_format,
        "layers": request.policy.describe(),
        "backend": ", ".join(f"{name}: {get(name).backend(device)}" for name in sorted(used)),
        "quantized_layers": dict(used),
        "kept_layers": sum(kept.values()),
        "kept_because": dict(kept),
        "quantized_convolutions": len(convolutions),
    }


def provenance(model, record: LoadRecord, request, **rest) -> dict:
    """Plain data that says what ``model`` is made of (bytes are of the diffusion model's weights)."""
    return {
        **quantization(record, request, model.load_device),
        "compute_dtype": str(model.model.get_dtype_inference()).removeprefix("torch."),
        "weight_bytes": weight_bytes(model),
        **rest,
    }


# Of what a walk wrote down: what says which weights these are and what they are worth.
ROUNDING = ("prompts", "states", "evaluations", "states_per_prompt", "seed", "heldout", "proof")


def rounding_facts(rounded: RoundedWeights) -> dict:
    """What a MODEL says of its calibrated weights: their digest, prompts, and held-out figures."""
    told = {key: rounded.provenance[key] for key in ROUNDING if key in rounded.provenance}
    calibrated = sum(layer.errors is not None for layer in rounded.layers.values())
    return {"digest": rounded.digest, "calibrated_layers": calibrated, **told}


def rounded_again(facts: Mapping, layers: int) -> dict:
    """``facts`` of a model of which so many layers were rounded again: nothing is proven of it."""
    left = facts["calibrated_layers"] - layers
    kept = {key: value for key, value in facts.items() if key != "proof"}
    return kept | {"calibrated_layers": left, "rounded_again": layers}


def weight_bytes(model) -> int:
    return comfy.model_management.module_size(model.model.diffusion_model)


def source_hash(model, record: LoadRecord | None = None) -> str:
    """A hash of the weights before quantization and patches."""
    samples = dict(record.samples) if record is not None else {}
    for key, value in model.model.diffusion_model.named_parameters():
        if key in samples or value.ndim < 2:
            continue
        backup = model.backup.get(f"diffusion_model.{key}")
        samples[key] = weight_sample(value.data if backup is None else backup.weight)
    return fingerprint(samples)


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
            "source_hash": source_hash(model),
            "format": quantized or UNQUANTIZED,
            "layers": "",
            "backend": f"{dtype} {model.load_device.type}",
            "compute_dtype": dtype,
            "weight_bytes": weight_bytes(model),
            "unquantized_bytes": weight_bytes(model),
        }
    return info | {"patches": patches_hash(model)}


def file_of(model) -> str:
    """The name of the file that a MODEL comes from, "" where neither it nor its loader tells."""
    known = model.model_options.get(INFO, {}).get("source", "")
    if known:
        return known
    factory, values = (*(model.cached_patcher_init or (None, ())), ())[:2]
    first = values[0] if factory is not None and values else None
    return Path(first).name if isinstance(first, str | Path) else ""


def _host_quantization(model) -> str:
    """The formats of a model that was quantized by something else; "" if it was not."""
    found = set()
    for parameter in model.model.diffusion_model.parameters():
        if isinstance(parameter.data, QuantizedTensor):
            found.add(parameter.data._layout_cls)
        elif parameter.ndim > 1 and parameter.dtype not in (torch.float32, *HALF):
            found.add(str(parameter.dtype).removeprefix("torch."))
    return "+".join(sorted(found))


def unpatched_state(patcher) -> dict[str, torch.Tensor]:
    """The state dict of a patcher's model as it is without the patches in its weights."""
    state = patcher.model.state_dict()
    kept = {key: weight for key, (weight, *_) in patcher.backup.items()}
    kept |= {key: weight for key, (weight, *_) in patcher.hook_backup.items()}
    for key, weight in kept.items():
        packed = isinstance(weight, QuantizedTensor)
        state |= weight.state_dict(key) if packed else {key: weight}
    return state


def patches_hash(model) -> str:
    """A hash of the LoRAs and the like on ``model``, "" if there are none."""
    if not model.patches:
        return ""
    digest = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        digest.update(str(key).encode())
        for strength, value, strength_model, *_ in model.patches[key]:
            digest.update(f"{strength} {strength_model}".encode())
            for tensor in _tensors(getattr(value, "weights", value)):
                digest.update(weight_sample(tensor))
    return digest.hexdigest()[:32]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def weights_hash(
    state: Mapping[str, torch.Tensor], patches: str = "", dtype: torch.dtype | None = None
) -> str:
    """SHA-256 (hex) of a sample of every tensor of a state dict, and of a hash of its patches.

    With a ``dtype`` it is of the values in that.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            sample = value.detach().flatten()[:SAMPLES]
            if dtype is not None and sample.is_floating_point():
                sample = sample.to(dtype)
            sample = sample.float().cpu().tolist()
            digest.update(f"{name} {list(value.shape)} {sample}\n".encode())
    if patches:
        digest.update(f"patches {patches}\n".encode())
    return digest.hexdigest()


def clip_hash(clip) -> str:
    """A hash of a CLIP's weights and patches, the same before and after ComfyUI patches in place."""
    return weights_hash(unpatched_state(clip.patcher), patches_hash(clip.patcher))


def vae_hash(vae) -> str:
    """A hash of a VAE's weights, in the dtype that it computes in.

    Loading dynamically, ComfyUI keeps them in the file's, and casts each when it is used.
    """
    return weights_hash(vae.first_stage_model.state_dict(), dtype=getattr(vae, "vae_dtype", None))


def describe(info: Mapping) -> str:
    """Formats, layers and sizes in a few lines, for a node's text output."""
    before, after = info["unquantized_bytes"], info["weight_bytes"]
    layers = ", ".join(f"{count} in {name}" for name, count in info["quantized_layers"].items())
    convolutions = info["quantized_convolutions"]
    kept = ", ".join(f"{count} {why}" for why, count in info["kept_because"].items())
    text = (
        f"{markdown(info['source'] or 'model')}: {info['format']}\n"
        f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({before / max(after, 1):.2f}x smaller)\n"
        f"layers: {layers or 'none quantized'}; {info['kept_layers']} kept"
        + (f" ({kept})\n" if kept else "\n")
        + (
            f"{convolutions} of them convolutions, run on dequantized weights\n"
            if convolutions
            else ""
        )
        + f"runs on {info['backend'] or 'torch'}, computes in {info['compute_dtype']}"
    )
    if "rounding" in info:
        text += f"\ncalibrated: {calibration_line(info['rounding'])}"
    return text + (f"\nlayers input: {markdown(info['layers'])}" if info["layers"] else "")


def calibration_line(facts: Mapping) -> str:
    """What a MODEL's calibrated weights are worth, in a line."""
    text = f"{facts['calibrated_layers']} layers"
    distance = facts.get("proof", {}).get("distance")
    if distance is not None:
        text += (
            f"; distance to the unquantized model {distance['calibrated']:.5f} on "
            f"{facts['proof']['prompts']} held-out prompts, plain rounding {distance['plain']:.5f}"
        )
    if facts.get("rounded_again"):
        text += (
            f"; {facts['rounded_again']} layers were rounded again with a LoRA and lost their "
            "calibration: connect the LoRA before Calibrate Weights to keep it"
        )
    return text


def layer_rows(module: torch.nn.Module) -> list[LayerRow]:
    """A row for each layer of ``module`` that has a weight of two or more dimensions."""
    rows = []
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.ndim < 2:
            continue
        stored = getattr(layer, "stored", None)
        sizes = layer.state_dict()
        nbytes = sum(t.nbytes for k, t in sizes.items() if k.startswith("weight"))
        form, error = str(weight.dtype).removeprefix("torch."), None
        calibrated = None if stored is None else stored.calibrated
        if stored is not None:
            form, error = stored.choice.format, stored.error
        elif isinstance(weight.data, QuantizedTensor):
            form = weight.data._layout_cls
        elif weight.dtype == torch.uint8:
            form = str(getattr(getattr(weight, "tensor_type", None), "name", "uint8"))
        shape = tuple(getattr(weight, "tensor_shape", weight.shape))
        why = getattr(getattr(layer, "choice", None), "why", "")
        kind = {2: "linear", 4: "conv2d"}.get(len(shape), type(layer).__name__)
        rows.append(LayerRow(name, kind, shape, form, nbytes, error, why, calibrated))
    return rows


def report_title(model) -> str:
    """One line about ``model`` for a report's head."""
    info = model_info(model)
    size = f"{info['unquantized_bytes'] / 1e6:.1f} -> {info['weight_bytes'] / 1e6:.1f} MB"
    return f"{info['source'] or 'model'}: {info['format']}, {size}"
