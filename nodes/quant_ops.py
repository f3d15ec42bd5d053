"""Weight formats inside ComfyUI (0.30.0): tensor layouts and the ops that hold them.

Builds on core's mixed-precision ops and comfy-kitchen's QuantizedTensor, so that LoRA, offload,
size accounting and saving work as on core's own quantized models.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import comfy.model_management
import comfy.ops
import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    TensorWiseINT8Layout,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from ..qsched_core.formats import FORMATS, LayerPolicy, WeightFormat, get_format

PREFIX = "qsched_"  # of the names under which extended formats are stored in a file
NATIVE_INT8 = "int8_tensorwise"


class ExtendedLayout(QuantizedLayout):
    """A QuantizedLayout around one of the core's weight formats."""

    format: WeightFormat

    @classmethod
    def quantize(
        cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, device=None, **_
    ):
        packed = cls.format.quantize(tensor.to(device=device), int(stochastic_rounding or 0))
        return cls.wrap(packed, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def wrap(cls, packed, dtype, shape):
        scales = {name: packed[name] for name in cls.format.scale_names}
        return packed["data"], cls.Params(orig_dtype=dtype, orig_shape=shape, **scales)

    @classmethod
    def packed(cls, qdata, params):
        return {"data": qdata} | {name: getattr(params, name) for name in cls.format.scale_names}

    @classmethod
    def dequantize(cls, qdata, params):
        return cls.format.dequantize(
            cls.packed(qdata, params), stored_shape(params), params.orig_dtype
        )

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return tuple(cls.packed(qtensor._qdata, qtensor._params).values())

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in cls.format.scale_names}


def stored_shape(params) -> tuple[int, int]:
    """[out, in] of the stored matrix, whichever way round it is being used."""
    return params.orig_shape[::-1] if params.transposed else params.orig_shape


def _make_layout(weight_format: WeightFormat) -> type[ExtendedLayout]:
    extra = [n for n in weight_format.scale_names if n != "scale"]
    params = dataclasses.make_dataclass(
        "Params",
        [(n, torch.Tensor, field(default=None)) for n in extra]
        + [("transposed", bool, field(default=False))],
        bases=(BaseLayoutParams,),
        namespace={"_tensor_fields": lambda self: list(weight_format.scale_names)},
        frozen=True,
    )
    name = layout_name(weight_format.name)
    layout = type(name, (ExtendedLayout,), {"Params": params, "format": weight_format})
    register_layout_class(name, layout)
    return layout


def layout_name(format_name: str) -> str:
    return f"QSched_{format_name}"


EXTENDED = {f.name: _make_layout(f) for f in FORMATS.values() if not f.native}


def _linear(x, weight, bias):
    """x times an extended weight, by the format's own arithmetic."""
    layout = weight.layout_cls
    packed = layout.packed(weight._qdata, weight._params)
    return layout.format.linear(x, packed, stored_shape(weight._params), bias)


def _is_extended(value) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, ExtendedLayout)


@register_layout_op(torch.ops.aten.t.default, ExtendedLayout)
def _op_t(qt, args, kwargs):
    old = qt._params
    params = dataclasses.replace(
        old, orig_shape=old.orig_shape[::-1], transposed=not old.transposed
    )
    return QuantizedTensor(qt._qdata, qt._layout_cls, params)


@register_layout_op(torch.ops.aten.linear.default, ExtendedLayout)
def _op_linear(qt, args, kwargs):
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else None
    if (
        _is_extended(weight)
        and not weight._params.transposed
        and not isinstance(x, QuantizedTensor)
    ):
        return _linear(x, weight, bias)
    return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))


@register_layout_op(torch.ops.aten.mm.default, ExtendedLayout)
def _op_mm(qt, args, kwargs):
    x, weight = args[0], args[1]
    if _is_extended(weight) and weight._params.transposed and not isinstance(x, QuantizedTensor):
        return _linear(x, weight, None)
    return torch.mm(*dequantize_args((x, weight)))


@register_layout_op(torch.ops.aten.addmm.default, ExtendedLayout)
def _op_addmm(qt, args, kwargs):
    bias, x, weight = args[:3]
    plain = not kwargs and not isinstance(x, QuantizedTensor)
    if _is_extended(weight) and weight._params.transposed and plain:
        return _linear(x, weight, bias)
    return torch.addmm(*dequantize_args((bias, x, weight)), **kwargs)


@dataclass
class LoadReport:
    """What became of each layer while a model was loaded: (format, bytes, float16 bytes)."""

    layers: dict[str, tuple[str, int, int]] = field(default_factory=dict)


def quantizing_ops(policy: LayerPolicy, compute_dtype: torch.dtype, report: LoadReport):
    """An ops class for ``model_options["custom_operations"]``: quantizes matrices as they load.

    Weights that are stored quantized (core's formats, or this pack's) are taken as they are.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class QuantizingOps(base):
        class Linear(base.Linear):
            def _load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            ):
                rest = (local_metadata, strict, missing, unexpected, errors)
                layer = prefix.rstrip(".")
                weight = state_dict.get(f"{prefix}weight")
                stored = _stored_format(state_dict, prefix)
                choice = None
                if weight is not None and stored is None and weight.is_floating_point():
                    choice = policy.choose(layer, tuple(weight.shape))
                if choice is not None and not bool(torch.isfinite(weight).all()):
                    raise ValueError(f"{layer}.weight holds NaN or infinity; the file is damaged")
                if choice is not None and get_format(choice.format).native:
                    _store_int8(state_dict, prefix, weight, choice.weight_only)
                elif choice is not None:
                    layout = EXTENDED[choice.format]
                    packed = layout.format.quantize(weight.to(_quantize_device(self)))
                    _keep_packed(self, layout, packed, tuple(weight.shape), choice.weight_only)
                elif _is_extended(weight):
                    packed = weight.layout_cls.packed(weight._qdata, weight._params)
                    weight_only = stored.get("full_precision_matrix_mult", False)
                    _keep_packed(self, weight.layout_cls, packed, self._orig_shape, weight_only)
                if getattr(self, "quant_format", None) is None:
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                else:
                    for name in ("weight", "comfy_quant"):
                        state_dict.pop(prefix + name, None)
                    torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
                    if f"{prefix}weight" in missing:
                        missing.remove(f"{prefix}weight")
                if isinstance(self.weight, QuantizedTensor):
                    tensors = self.weight.state_dict("")
                    size = sum(t.numel() * t.element_size() for t in tensors.values())
                    name = self.quant_format.removeprefix(PREFIX).replace(NATIVE_INT8, "int8")
                    report.layers[layer] = (name, size, 2 * self.weight.numel())

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                out = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                if _is_extended(self.weight):
                    conf = _stored_format(out, prefix) | {"shape": list(self._orig_shape)}
                    out[f"{prefix}comfy_quant"] = _marker(conf)
                return out

            def forward(self, input, *args, **kwargs):
                if not (getattr(self, "quant_format", None) or "").startswith(PREFIX):
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                # patched or offload-cast weights are floats by then: multiplied as such
                packed = not (
                    self._full_precision_mm
                    or getattr(self, "comfy_force_cast_weights", False)
                    or self.weight_function
                    or self.bias_function
                )
                return self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=packed)

    return QuantizingOps


def _quantize_device(module) -> torch.device | None:
    """Where to quantize: the GPU if there is one, which is many times faster."""
    return comfy.model_management.get_torch_device()


def _stored_format(state_dict, prefix) -> dict | None:
    marker = state_dict.get(f"{prefix}comfy_quant")
    return None if marker is None else json.loads(bytes(marker.cpu().numpy()))


def _marker(conf: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def _store_int8(state_dict, prefix, weight, weight_only) -> None:
    """Replace a float weight by ComfyUI's own int8 tensors, for core's loading code to take."""
    qdata, params = TensorWiseINT8Layout.quantize(weight.float(), per_channel=True)
    conf = {"format": NATIVE_INT8}
    if weight_only:
        conf["full_precision_matrix_mult"] = True
    state_dict.update(
        {
            f"{prefix}weight": qdata,
            f"{prefix}weight_scale": params.scale,
            f"{prefix}comfy_quant": _marker(conf),
        }
    )


def _keep_packed(module, layout, packed, shape, weight_only) -> None:
    """Make ``packed`` the weight of a Linear module."""
    device, dtype = module.factory_kwargs["device"], module.factory_kwargs["dtype"]
    packed = {name: tensor.to(device) for name, tensor in packed.items()}
    qdata, params = layout.wrap(packed, dtype, shape)
    tensor = QuantizedTensor(qdata, layout_name(layout.format.name), params)
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    module.quant_format = PREFIX + layout.format.name
    module.layout_type = layout_name(layout.format.name)
    if weight_only and layout.format.quantizes_activations:
        module._full_precision_mm = module._full_precision_mm_config = True


def wrap_stored(state_dict: dict, compute_dtype: torch.dtype) -> dict:
    """Packed weights of extended formats as QuantizedTensors, in a copy of ``state_dict``.

    A packed matrix has another shape than the weight it stands for, and core's model detection
    reads shapes; a QuantizedTensor has the logical one.  ValueError names a missing scale.
    """
    out = dict(state_dict)
    for key in state_dict:
        prefix = key.removesuffix("comfy_quant")
        if prefix == key or not (stored := _stored_format(state_dict, prefix))["format"].startswith(
            PREFIX
        ):
            continue
        name = stored["format"].removeprefix(PREFIX)
        if name not in EXTENDED or "shape" not in stored:
            raise ValueError(
                f"{prefix}weight is stored as {stored['format']!r}, which is not known here; update the nodes"
            )
        layout = EXTENDED[name]
        packed = {"data": out[f"{prefix}weight"]}
        for scale in layout.format.scale_names:
            if (packed_key := f"{prefix}weight_{scale}") not in out:
                raise ValueError(f"{packed_key} is missing; the file is damaged, quantize it again")
            packed[scale] = out.pop(packed_key)
        qdata, params = layout.wrap(packed, compute_dtype, tuple(stored["shape"]))
        out[f"{prefix}weight"] = QuantizedTensor(qdata, layout_name(name), params)
    return out


def is_quantized_tensor(value) -> bool:
    return isinstance(value, QuantizedTensor)


__all__ = [
    "EXTENDED",
    "LoadReport",
    "is_quantized_tensor",
    "wrap_stored",
    "quantizing_ops",
]
