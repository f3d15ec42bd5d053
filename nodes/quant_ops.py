"""Our weight formats as ComfyUI operations (0.30.0, comfy-kitchen 0.2.26).

Each extended format becomes a ``QuantizedLayout`` registered under a name of its own; native ones
use the host's layout.  ``quantized_ops`` makes the operations class that a model is built with: it
quantizes each layer when its weight is loaded, one at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)

from ..qsched_core.formats import FormatError, Packed, WeightFormat, get, names
from ..qsched_core.formats.policy import Choice, Policy

PREFIX = "qsched_"  # of our formats in a saved file's "comfy_quant"
NATIVE = {"int8": ("int8_tensorwise", "TensorWiseINT8Layout")}  # ours: ComfyUI's algorithm, layout
SAMPLES = 16  # values of a weight that its fingerprint is taken from


class PackedLayout(QuantizedLayout):
    """The host's view of one ``WeightFormat``; subclasses name it in FORMAT.

    A ``QuantizedTensor`` of this layout has the weight's logical shape and dtype; ``_qdata`` holds
    the codes and ``Params`` a field for each of the format's tables.
    """

    FORMAT: WeightFormat
    NAME: str

    @classmethod
    def quantize(
        cls,
        tensor,
        scale=None,
        stochastic_rounding=0,
        inplace_ops=False,
        like=None,
        weight_only=False,
        **kwargs,
    ):
        """Called by the host with a seed when it bakes a LoRA into the weight."""
        if like is not None:
            like = like.to(tensor.device)
        packed = cls.FORMAT.quantize(tensor, seed=stochastic_rounding or None, like=like)
        return packed.codes, cls.params(packed, tensor.dtype, weight_only)

    @classmethod
    def params(cls, packed: Packed, dtype: torch.dtype, weight_only: bool = False):
        return cls.Params(
            orig_dtype=dtype, orig_shape=packed.shape, weight_only=weight_only, **packed.aux
        )

    @classmethod
    def packed(cls, qdata: torch.Tensor, params) -> Packed:
        shape = params.orig_shape[::-1] if params.transposed else params.orig_shape
        return Packed(qdata, {name: getattr(params, name) for name in cls.FORMAT.aux}, shape)

    @classmethod
    def dequantize(cls, qdata, params):
        return cls.FORMAT.dequantize(cls.packed(qdata, params), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata, *(getattr(qtensor._params, name) for name in cls.FORMAT.aux))

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in cls.FORMAT.aux}

    @classmethod
    def requantize_kwargs(cls, qtensor):
        params = qtensor._params
        return {"like": cls.packed(qtensor._qdata, params), "weight_only": params.weight_only}


def _params_class(form: WeightFormat) -> type:
    """BaseLayoutParams with a tensor field for each table ("scale" is the base's own)."""

    def tensor_fields(self) -> list[str]:
        return list(form.aux)

    extra: list[tuple[str, Any, Any]] = [
        (name, torch.Tensor, field(default=None)) for name in form.aux if name != "scale"
    ]
    return dataclasses.make_dataclass(
        "Params",
        [
            *extra,
            ("transposed", bool, field(default=False)),
            ("weight_only", bool, field(default=False)),
        ],
        bases=(BaseLayoutParams,),
        namespace={"_tensor_fields": tensor_fields},
        frozen=True,
    )


def _register_layouts() -> dict[str, type[PackedLayout]]:
    """A layout for each extended format, known to comfy-kitchen under a name prefixed "QSched"."""
    layouts = {}
    for name in names():
        form = get(name)
        if name in NATIVE:
            continue
        label = f"QSched{name.upper()}Layout"
        members = {"FORMAT": form, "NAME": label, "Params": _params_class(form)}
        layouts[name] = type(label, (PackedLayout,), members)
        register_layout_class(label, layouts[name])
    return layouts


LAYOUTS = _register_layouts()


def _is_packed(value) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, PackedLayout)


def _product(x, weight, bias):
    """x @ weight.T + bias in the format's own arithmetic; ``weight`` is not transposed."""
    layout = weight.layout_cls
    if isinstance(x, QuantizedTensor):
        x = x.dequantize()
    packed = layout.packed(weight._qdata, weight._params)
    return layout.FORMAT.linear(x, packed, bias, weight._params.weight_only)


@register_layout_op(torch.ops.aten.t.default, PackedLayout)
def _t(qt, args, kwargs):
    params = dataclasses.replace(
        qt._params, orig_shape=qt._params.orig_shape[::-1], transposed=not qt._params.transposed
    )
    return QuantizedTensor(qt._qdata, qt._layout_cls, params)


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _linear(qt, args, kwargs):
    x, weight, bias = (*args, None)[:3]
    if not _is_packed(weight) or weight._params.transposed:
        return torch.nn.functional.linear(*dequantize_args(args))
    return _product(x, weight, bias)


@register_layout_op(torch.ops.aten.mm.default, PackedLayout)
def _mm(qt, args, kwargs):
    x, weight = args
    if not _is_packed(weight) or not weight._params.transposed:
        return torch.mm(*dequantize_args(args))
    return _product(x, weight, None)


@register_layout_op(torch.ops.aten.addmm.default, PackedLayout)
def _addmm(qt, args, kwargs):
    bias, x, weight = args
    if kwargs or not _is_packed(weight) or not weight._params.transposed:
        return torch.addmm(*dequantize_args(args), **kwargs)
    return _product(x, weight, bias)


def quantized_tensor(packed: Packed, choice: Choice, dtype: torch.dtype) -> QuantizedTensor:
    """The host's tensor for a packing made as ``choice`` says."""
    if choice.format in NATIVE:
        _, label = NATIVE[choice.format]
        params = get_layout_class(label).Params(
            scale=packed.aux["scale"], orig_dtype=dtype, orig_shape=packed.shape
        )
        return QuantizedTensor(packed.codes, label, params)
    layout = LAYOUTS[choice.format]
    params = layout.params(packed, dtype, choice.weight_only)
    return QuantizedTensor(packed.codes, layout.NAME, params)


def saved_format(entry: Mapping) -> str | None:
    """Our name for the format of a layer's "comfy_quant" entry; None for one we don't restore."""
    name = str(entry.get("format", ""))
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in LAYOUTS:
        return name.removeprefix(PREFIX)
    plain = not entry.get("convrot") and not (entry.get("params") or {}).get("convrot")
    native = {algorithm: ours for ours, (algorithm, _) in NATIVE.items()}
    return native.get(name) if plain else None


def restore_saved(sd: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Replace the packed tensors of a saved file by quantized tensors of the logical shape.

    The host's model detection and loading then see an ordinary state dict of ``dtype``.
    """
    for key in [k for k in sd if k.endswith(".comfy_quant")]:
        name, entry = key.removesuffix(".comfy_quant"), read_conf(sd.pop(key))
        form = saved_format(entry)
        if form is None:
            raise FormatError(f"layer {name} is in format {entry.get('format')!r}, unknown here")
        codes = sd[f"{name}.weight"]
        aux = {table: sd.pop(f"{name}.weight_{table}") for table in get(form).aux}
        if form in NATIVE:
            aux["scale"] = aux["scale"].float().reshape(-1, 1).expand(codes.shape[0], 1)
        packed = Packed(codes, aux, tuple(entry.get("shape", codes.shape)))
        choice = Choice(form, bool(entry.get("full_precision_matrix_mult")))
        tensor = quantized_tensor(packed, choice, dtype)
        tensor.qsched = (choice, bytes.fromhex(entry.get("sample", "")))
        sd[f"{name}.weight"] = tensor


def read_conf(tensor: torch.Tensor) -> dict:
    """The JSON that a "comfy_quant" tensor holds."""
    return json.loads(tensor.numpy().tobytes())


def saved_name(name: str) -> str:
    """What "comfy_quant" calls format ``name`` in a saved file."""
    return NATIVE[name][0] if name in NATIVE else PREFIX + name


def weight_sample(weight: torch.Tensor) -> bytes:
    """A few of the weight's values in bf16, for a fingerprint that a cast does not change."""
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass
class LoadRecord:
    """What happened while a model's weights were loaded: filled in by the operations."""

    formats: dict[str, Choice] = field(default_factory=dict)  # quantized layers, by name
    layers: list[str] = field(default_factory=list)  # every layer a policy was asked about
    samples: dict[str, bytes] = field(default_factory=dict)  # of weights before quantization


def quantized_ops(
    policy: Policy,
    record: LoadRecord,
    device: torch.device,
    merge: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
):
    """Operations for a model whose linear layers are quantized while they load.

    ``policy`` chooses each layer's format, ``device`` is where quantizing is done, and
    ``merge(key, weight)``, if given, is asked for the weight to use (a LoRA merged in).
    """
    base = comfy.ops.mixed_precision_ops()

    class QuantizedOps(base):
        class Linear(base.Linear):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__(in_features, out_features, False, device, dtype)
                # What is kept has the model's own dtype, as in the host's other operations.
                self.factory_kwargs = {"device": device, "dtype": dtype}
                if bias:
                    self.bias = torch.nn.Parameter(
                        torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
                    )
                self.format: str | None = None
                self.weight_only = False
                self.sample = b""  # of the weight before quantization

            def _load_from_state_dict(self, state_dict, prefix, *args):
                key = prefix + "weight"
                weight = state_dict.get(key)
                if weight is None or prefix + "comfy_quant" in state_dict:
                    return super()._load_from_state_dict(state_dict, prefix, *args)
                name = prefix.rstrip(".")
                record.layers.append(name)
                if isinstance(weight, QuantizedTensor):
                    choice, sample = weight.qsched
                    record.samples[key] = sample or weight_sample(weight.dequantize())
                    return self._load_packed(choice, weight, name, state_dict, prefix, *args)
                if merge is not None:
                    state_dict[key] = weight = merge(key, weight)
                record.samples[key] = weight_sample(weight)
                choice = policy(name, tuple(weight.shape))
                if choice is None:
                    return super()._load_from_state_dict(state_dict, prefix, *args)
                packed = _quantize(weight, choice, name, device)
                dtype = self.factory_kwargs["dtype"] or torch.get_default_dtype()
                tensor = quantized_tensor(packed, choice, dtype)
                self._load_packed(choice, tensor, name, state_dict, prefix, *args)

            def _load_packed(self, choice, tensor, name, state_dict, prefix, *args):
                """Take the packed weight, and the bias by torch's own loader."""
                del state_dict[prefix + "weight"]
                record.formats[name] = choice
                tensor = tensor.to(self.factory_kwargs["device"] or "cpu")
                self.weight = torch.nn.Parameter(tensor, requires_grad=False)
                self.sample = record.samples[prefix + "weight"]
                self.format, self.weight_only = choice.format, choice.weight_only
                self.quant_format = saved_name(choice.format)
                self.layout_type = self.weight._layout_cls
                self._full_precision_mm_config = choice.weight_only
                torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
                missing = args[2]
                if prefix + "weight" in missing:
                    missing.remove(prefix + "weight")

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                sd = destination if destination is not None else {}
                extra = None
                if self.format is not None:
                    extra = {"shape": list(self.weight.shape), "sample": self.sample.hex()}
                return comfy.ops._quantized_weight_state_dict(self, sd, prefix, extra)

            def forward(self, input, *args, **kwargs):
                if self.format is None or (self.format in NATIVE and not self.weight_only):
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                plain = not (
                    self.weight_function
                    or self.bias_function
                    or getattr(self, "comfy_force_cast_weights", False)
                )
                return self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=plain)

            def _forward(self, input, weight, bias):
                if self.weight_only and isinstance(weight, QuantizedTensor):
                    weight = weight.dequantize()
                return super()._forward(input, weight, bias)

    return QuantizedOps


def _quantize(weight, choice: Choice, name: str, device: torch.device) -> Packed:
    try:
        return get(choice.format).quantize(weight.to(device))
    except FormatError as error:
        raise FormatError(f"layer {name}: {error}") from error


def fingerprint(samples: dict[str, bytes]) -> str:
    """One hash of the samples of a model's weights, by their names."""
    digest = hashlib.sha256()
    for key in sorted(samples):
        digest.update(key.encode() + b"\0" + samples[key])
    return digest.hexdigest()[:32]
