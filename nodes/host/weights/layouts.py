"""Our weight formats as comfy-kitchen tensors, in memory and in files (ComfyUI 0.30.0).

Each extended format becomes a ``QuantizedLayout`` registered under a name of its own; native ones
use the host's layout.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

from ....qsched_core.formats import FormatError, Packed, WeightFormat, get, names
from ....qsched_core.formats.files import MappedFile
from ....qsched_core.formats.layer_entry import SUFFIX, check_tables, read_entry
from ....qsched_core.formats.policy import Choice
from ....qsched_core.text import said, shown


@dataclass(frozen=True, eq=False)
class WeightSource:
    """The weight that was quantized, in a file: it takes no memory until it is read."""

    weight: torch.Tensor
    file: MappedFile

    def read(self, device: torch.device) -> torch.Tensor:
        """A copy in fp32 on ``device``; FormatError if the file was changed since it was loaded."""
        return self.file.read(self.weight).to(device, torch.float32)


SEED = 1  # for stochastic rounding where no layer name gives one


class PatchableTensor(QuantizedTensor):
    """A quantized tensor whose codes and tables can be overwritten in place.

    ComfyUI's hooks need it: while a model samples they write patched weights (floats) into it, and
    later the stored ones.  ``source`` is the unpatched weight that was quantized; None if it can't
    be read again.
    """

    source: WeightSource | None = None

    def _copy_with(self, qdata=None, params=None, clone_params=True):
        if params is None:
            params = self._params.clone() if clone_params else self._params
        out = type(self)(self._qdata if qdata is None else qdata, self._layout_cls, params)
        out.source = self.source
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = args[0] if args else None
        if isinstance(first, cls) and func is torch.ops.aten.detach.default:
            # It shares the tables too, so that writing to ``.data`` reaches them.
            return first._copy_with(first._qdata.detach(), clone_params=False)
        if isinstance(first, cls) and func is torch.ops.aten.copy_.default:
            return first._write(args[1])
        return super().__torch_dispatch__(func, types, args, kwargs)

    @staticmethod
    def __tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride):
        found = QuantizedTensor.__tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride)
        return PatchableTensor(found._qdata, found._layout_cls, found._params)

    def _write(self, values: torch.Tensor) -> PatchableTensor:
        """Take the values of a tensor of this layout, or a float one's, quantized."""
        if not isinstance(values, QuantizedTensor):
            values = self.rounded(values, SEED)
        if values._layout_cls != self._layout_cls:
            raise TypeError(f"{values._layout_cls} can't be copied to {self._layout_cls}")
        for own, new in zip(self.tensors(), PatchableTensor.tensors(values), strict=True):
            own.copy_(new)
        return self

    def tensors(self) -> list[torch.Tensor]:
        """The codes, and the tables."""
        return [self._qdata, *(getattr(self._params, n) for n in self._params._tensor_fields())]

    def rounded(self, weight: torch.Tensor, seed: int, inplace: bool = False) -> PatchableTensor:
        """A patched weight, quantized like this one.

        With a source, ``weight`` is full precision plus the patch: it is rounded to the nearest, as a
        merged file would be.  Without one it is rounded values plus the patch: rounding again to the
        nearest would lose small patches, so it rounds stochastically.
        """
        options = {"scale": "recalculate", "stochastic_rounding": seed, "inplace_ops": inplace}
        if self.source is not None:
            options |= {"stochastic_rounding": 0, "like": None}
        if not issubclass(self.layout_cls, PackedLayout):
            options.pop("like", None)
        return self.requantize_from_float(weight, **options).to(self.dtype)


PREFIX = "qsched_"  # begins the names of our formats in a saved file's "comfy_quant"
# What follows them there: ComfyUI's own loaders show the whole text in their error.
HINT = (
    "open this file with Load Diffusion Model (Quantized) or Load Checkpoint (Quantized), of the "
    "ComfyUI-QSched nodes"
)


class PackedLayout(QuantizedLayout):
    """The host's view of one extended ``WeightFormat``; subclasses name it in FORMAT.

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
        """Called by the host with a seed when it bakes a LoRA into the weight.

        Then values round stochastically, so that a small LoRA survives on average.
        """
        if like is not None:
            like = like.to(tensor.device)
        packed = cls.FORMAT.quantize(tensor, seed=stochastic_rounding or None, like=like)
        return packed.codes, cls.params(packed, tensor.dtype, weight_only)

    @classmethod
    def params(cls, packed: Packed, dtype: torch.dtype, weight_only: bool = False):
        return cls.Params(
            orig_dtype=dtype,
            orig_shape=packed.shape,
            weight_only=weight_only,
            options=tuple(packed.options.items()),
            **packed.aux,
        )

    @classmethod
    def dequantize(cls, qdata, params):
        return cls.FORMAT.dequantize(_packed(cls.FORMAT, qdata, params), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata, *(getattr(qtensor._params, name) for name in cls.FORMAT.aux))

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": _as_the_weight(qdata, params.orig_shape)} | {
            f"_{name}": getattr(params, name) for name in cls.FORMAT.aux
        }

    @classmethod
    def requantize_kwargs(cls, qtensor):
        params = qtensor._params
        like = _packed(cls.FORMAT, qtensor._qdata, params)
        return {"like": like, "weight_only": params.weight_only}


def _as_the_weight(codes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes in rows as long as the weight's, where they fill them: ComfyUI knows UNets by these."""
    return codes.reshape(-1, *shape[1:]) if codes.numel() % math.prod(shape[1:]) == 0 else codes


def _packed(form: WeightFormat, qdata: torch.Tensor, params) -> Packed:
    """What ``form`` computes with, from the host's tensor."""
    shape = params.orig_shape
    if getattr(params, "transposed", False):
        shape = shape[::-1]
    if form.native is None:
        options = dict(params.options)
    else:
        own = (*form.aux, "orig_dtype", "orig_shape", "transposed")
        options = {
            f.name: getattr(params, f.name) for f in dataclasses.fields(params) if f.name not in own
        }
    return Packed(qdata, {name: getattr(params, name) for name in form.aux}, shape, options)


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
            ("options", tuple, field(default=())),
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
        if form.native is not None:
            continue
        label = f"QSched{name.upper()}Layout"
        members = {"FORMAT": form, "NAME": label, "Params": _params_class(form)}
        layouts[name] = type(label, (PackedLayout,), members)
        register_layout_class(label, layouts[name])
    return layouts


LAYOUTS = _register_layouts()


def _is_packed(value) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, PackedLayout)


def product(form: WeightFormat, x, weight, bias, weight_only: bool = False):
    """x @ weight.T + bias in ``form``'s own arithmetic; ``weight`` is not transposed."""
    if isinstance(x, QuantizedTensor):
        x = x.dequantize()
    return form.linear(x, _packed(form, weight._qdata, weight._params), bias, weight_only)


def _own_product(x, weight, bias):
    return product(weight.layout_cls.FORMAT, x, weight, bias, weight._params.weight_only)


@register_layout_op(torch.ops.aten.t.default, PackedLayout)
def _t(qt, args, kwargs):
    params = dataclasses.replace(
        qt._params, orig_shape=qt._params.orig_shape[::-1], transposed=not qt._params.transposed
    )
    return qt._copy_with(params=params)


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _linear(qt, args, kwargs):
    x, weight, bias = (*args, None)[:3]
    if not _is_packed(weight) or weight._params.transposed:
        return torch.nn.functional.linear(*dequantize_args(args))
    return _own_product(x, weight, bias)


@register_layout_op(torch.ops.aten.mm.default, PackedLayout)
def _mm(qt, args, kwargs):
    x, weight = args
    if not _is_packed(weight) or not weight._params.transposed:
        return torch.mm(*dequantize_args(args))
    return _own_product(x, weight, None)


@register_layout_op(torch.ops.aten.addmm.default, PackedLayout)
def _addmm(qt, args, kwargs):
    bias, x, weight = args
    if kwargs or not _is_packed(weight) or not weight._params.transposed:
        return torch.addmm(*dequantize_args(args), **kwargs)
    return _own_product(x, weight, bias)


@dataclass(frozen=True)
class Stored:
    """What is known of a quantized layer besides its weight; it is saved in "comfy_quant".

    ``sample`` is a sample of the weight before quantization, ``error`` the relative error that
    quantization made.  A ``calibrated`` layer was rounded for its inputs: these are the relative
    errors of its output, rounded plainly and as it is.
    """

    choice: Choice
    sample: bytes = b""
    error: float | None = None
    calibrated: tuple[float, float] | None = None

    def entry(self, weight: QuantizedTensor) -> dict:
        """Our additions to the layer's "comfy_quant" entry (the host ignores them)."""
        options = dict(getattr(weight._params, "options", ()))
        found = {"shape": list(weight.shape), "sample": self.sample.hex()}
        if self.error is not None:
            found["error"] = round(self.error, 6)
        if self.calibrated is not None:
            found["calibrated"] = [round(error, 6) for error in self.calibrated]
        return found | ({"options": options} if options else {})

    @classmethod
    def from_entry(cls, form: str, entry: Mapping) -> Stored:
        choice = Choice(form, bool(entry.get("full_precision_matrix_mult")))
        calibrated = entry.get("calibrated")
        return cls(
            choice,
            bytes.fromhex(entry.get("sample", "")),
            entry.get("error"),
            None if calibrated is None else tuple(calibrated),
        )


def quantized_tensor(
    packed: Packed, choice: Choice, dtype: torch.dtype, source: WeightSource | None = None
) -> PatchableTensor:
    """The host's tensor for a packing of ``source`` made as ``choice`` says."""
    form = get(choice.format)
    if form.native is None:
        name = LAYOUTS[choice.format].NAME
        params = LAYOUTS[choice.format].params(packed, dtype, choice.weight_only)
    else:
        name = form.native.layout
        params = get_layout_class(name).Params(
            orig_dtype=dtype, orig_shape=packed.shape, **packed.aux, **packed.options
        )
    tensor = PatchableTensor(packed.codes, name, params)
    tensor.source = source
    return tensor


def saved_name(name: str) -> str:
    """What "comfy_quant" calls format ``name`` in a saved file."""
    native = get(name).native
    return PREFIX + name if native is None else native.algorithm


def with_hint(tensor: torch.Tensor, rounded_again: bool = False) -> torch.Tensor:
    """A layer's "comfy_quant" with ``HINT`` in it, if ComfyUI's own loaders can't open the layer.

    A layer that is ``rounded_again`` is not calibrated any more.
    """
    entry = json.loads(tensor.cpu().numpy().tobytes())
    if rounded_again:
        entry.pop("calibrated", None)
    if entry["format"].startswith(PREFIX):
        entry["format"] = f"{PREFIX}{saved_format(entry)}: {HINT}"
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def saved_format(entry: Mapping) -> str | None:
    """Our name for the format of a layer's "comfy_quant" entry; None for one we don't restore."""
    name = str(entry.get("format", "")).partition(":")[0]
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in LAYOUTS:
        return name.removeprefix(PREFIX)
    rotated = bool(entry.get("convrot") or (entry.get("params") or {}).get("convrot"))
    for form in map(get, names()):
        same = form.native is not None and form.native.algorithm == name
        if same and rotated == (form.name == "int8_convrot"):
            return form.name
    return None


def restore_saved(sd: dict[str, torch.Tensor], dtype: torch.dtype, file: str) -> None:
    """Replace the packed tensors of a saved file by quantized tensors of the logical shape.

    The host's model detection and loading then see an ordinary state dict of ``dtype``.
    FormatError names the file and a layer whose tensors are missing or do not fit together, or whose
    format is unknown.
    """
    for key in [k for k in sd if k.endswith(SUFFIX)]:
        name, entry = key.removesuffix(SUFFIX), read_entry(sd.pop(key), key, file)
        form = saved_format(entry)
        if form is None:
            raise FormatError(
                f"{file}: layer {shown(name)} is in format {shown(entry.get('format'))}, unknown here"
            )
        try:
            packed = _restore(sd, name, get(form), entry)
            check_tables(packed, get(form), key, file)
            stored = Stored.from_entry(form, entry)
            tensor = quantized_tensor(packed, stored.choice, dtype)
        except FormatError:
            raise
        except KeyError as error:
            raise FormatError(
                f"{file}: layer {shown(name)} ({form}) has no tensor {shown(error.args[0])}: the file is "
                "incomplete; save it again"
            ) from None
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            # what the host's tensors raise for values that do not fit together
            raise FormatError(
                f"{file}: layer {shown(name)} ({form}) has tensors that do not go together: "
                f"{said(error)}; get the file again"
            ) from error
        tensor.qsched = stored
        sd[f"{name}.weight"] = tensor


def _restore(sd: dict, name: str, form: WeightFormat, entry: Mapping) -> Packed:
    codes = sd[f"{name}.weight"]
    if form.native is None:
        aux = {table: sd.pop(f"{name}.weight_{table}") for table in form.aux}
        if list(codes.shape[1:]) == entry["shape"][1:]:
            codes = codes.reshape(entry["shape"][0], -1)
        return Packed(codes, aux, tuple(entry["shape"]), entry.get("options", {}))
    aux = {table: sd.pop(f"{name}.weight{form.native.keys[table]}") for table in form.aux}
    params = get_layout_class(form.native.layout).Params
    wanted = {f.name for f in dataclasses.fields(params)} - {"orig_dtype", "orig_shape"}
    options = {**(entry.get("params") or {}), **entry}
    options = {k: v for k, v in options.items() if k in wanted}
    return Packed(codes, aux, tuple(entry.get("shape", codes.shape)), options)
