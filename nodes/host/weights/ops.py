"""ComfyUI operations that quantize a model's layers while it loads (ComfyUI 0.30.0)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.float
import comfy.model_management
import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ....qsched_core.formats import FormatError, Packed, get
from ....qsched_core.formats.files import MappedFile
from ....qsched_core.formats.policy import Choice
from ....qsched_core.rounding import RoundedWeights
from ....qsched_core.text import shown
from .layouts import (
    PatchableTensor,
    Stored,
    WeightSource,
    product,
    quantized_tensor,
    saved_name,
)

SAMPLES = 16  # values of a weight that go into its fingerprint


def weight_sample(weight: torch.Tensor) -> bytes:
    """A few of the weight's values, in bf16: a cast of the weight does not change its fingerprint."""
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint(samples: dict[str, bytes]) -> str:
    """One hash of the samples of a model's weights, by their names."""
    digest = hashlib.sha256()
    for key in sorted(samples):
        digest.update(key.encode() + b"\0" + samples[key])
    return digest.hexdigest()[:32]


def _nothing(*_) -> None:
    pass


@dataclass
class LoadRecord:
    """What happened while a model's weights were loaded: filled in by the operations.

    ``progress`` is called once a layer and may raise to stop.  ``file`` is the mapped file that the
    weights are views of, if any.
    """

    progress: Callable[[], None] = _nothing
    file: MappedFile | None = None
    kinds: dict[str, str] = field(
        default_factory=dict
    )  # the kind of every layer that the policy was asked about
    choices: dict[str, Choice] = field(default_factory=dict)  # the policy's answers
    samples: dict[str, bytes] = field(default_factory=dict)  # of weights before quantization

    def check_same(self) -> None:
        """FormatError if the file was changed while it is loaded."""
        if self.file is not None:
            self.file.check_same()

    def source(self, weight: torch.Tensor) -> WeightSource | None:
        """A way to read ``weight`` again; None if it is not in the mapped file."""
        owned = self.file is not None and self.file.owns(weight)
        return WeightSource(weight, self.file) if owned else None

    def done(self, weight: torch.Tensor) -> None:
        """Release the memory that reading ``weight`` took."""
        if self.file is not None:
            self.file.release(weight)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in memory of its own: ComfyUI may write to it, and the mapped file is read-only."""
        packed = isinstance(tensor, PatchableTensor)
        parts = tensor.tensors() if packed else [tensor]
        if self.file is None or not any(map(self.file.owns, parts)):
            return tensor
        copy = tensor.clone()
        for part in parts:
            self.file.release(part)
        return copy


def quantized_ops(
    policy: Callable[[str, tuple[int, ...], str], Choice],
    record: LoadRecord,
    device: torch.device,
    merge: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    rounded: RoundedWeights | None = None,
):
    """Operations for a model whose linear layers and convolutions are quantized while they load.

    ``policy`` chooses each layer's format, ``device`` is where quantizing is done, and
    ``merge(key, weight)``, if given, is asked for the weight to use (a LoRA merged in).  Layers of
    ``rounded`` take their weights and biases from it.
    """
    base = comfy.ops.mixed_precision_ops()
    ready = {} if rounded is None else rounded.layers

    class Quantizing:
        """A layer that packs its weight, as the policy says, when a state dict is loaded."""

        kind: str
        choice = Choice(None)
        stored: Stored | None = None
        weight_only = False

        def _take(self, state_dict, prefix, *args) -> bool:
            """Load a weight that is quantized, or is to be; False if it stays as it is."""
            key, name = prefix + "weight", prefix.rstrip(".")
            weight = state_dict.get(key)
            if prefix + "comfy_quant" in state_dict:
                return False
            if weight is None:  # ComfyUI would go on with whatever is in memory there
                raise FormatError(
                    f"layer {name} has no weight in the file: it is incomplete; get it again"
                )
            record.progress()
            record.check_same()
            record.kinds[name] = self.kind
            self._check_shape(name, weight)
            if isinstance(weight, QuantizedTensor):
                stored, tensor = weight.qsched, record.own(weight)
                if not stored.sample:
                    stored = Stored(stored.choice, weight_sample(weight.dequantize()), stored.error)
            elif name in ready:
                choice, layer = rounded.chosen[name], ready[name]
                record.samples[key] = weight_sample(weight)
                dtype = self.factory_kwargs["dtype"] or torch.get_default_dtype()
                # It can't be read again: with a patch it would be rounded plainly.
                tensor = quantized_tensor(layer.packed, choice, dtype)
                stored = Stored(choice, record.samples[key], None, layer.errors)
                if layer.bias is not None:
                    state_dict[prefix + "bias"] = layer.bias
            else:
                source = weight
                if merge is not None:
                    state_dict[key] = weight = merge(key, weight)
                record.samples[key] = weight_sample(source)
                self.choice = record.choices[name] = policy(name, tuple(weight.shape), self.kind)
                if self.choice.format is None:
                    # A copy: a view would keep the file open.
                    state_dict[key] = weight.clone() if weight is source else weight
                    record.done(source)
                    return False
                packed = _quantize(weight, self.choice, name, device)
                dtype = self.factory_kwargs["dtype"] or torch.get_default_dtype()
                # A merged weight is in no file: it can't be read again.
                tensor = quantized_tensor(packed, self.choice, dtype, record.source(weight))
                stored = Stored(self.choice, record.samples[key], packed.error)
                record.done(source)
            del state_dict[key]
            self._put(tensor, stored)
            record.choices[name], record.samples[key] = stored.choice, stored.sample
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            missing = args[2]
            if key in missing:
                missing.remove(key)
            return True

        def _check_shape(self, name: str, weight: torch.Tensor) -> None:
            """FormatError unless the weight has the shape that the model gives this layer."""
            if self.kind == "linear":
                wanted = (self.out_features, self.in_features)
            else:
                wanted = tuple(self.weight.shape)
            if tuple(weight.shape) != wanted:
                raise FormatError(
                    f"layer {name} has a weight of the shape {shown(list(weight.shape))}, and the model "
                    f"one of {list(wanted)}; get the file again"
                )

        def _put(self, tensor: QuantizedTensor, stored: Stored) -> None:
            tensor = tensor.to(self.factory_kwargs["device"] or "cpu")
            self.weight = torch.nn.Parameter(tensor, requires_grad=False)
            self.choice, self.stored = stored.choice, stored
            self.weight_only = stored.choice.weight_only
            self.quant_format = saved_name(stored.choice.format)
            self.layout_type = self.weight._layout_cls
            self._full_precision_mm_config = self.weight_only

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            sd = destination if destination is not None else {}
            extra = None if self.stored is None else self.stored.entry(self.weight)
            return comfy.ops._quantized_weight_state_dict(self, sd, prefix, extra)

        def convert_weight(self, weight, inplace=False, **kwargs):
            """The weight that ComfyUI adds a patch to: from the source file if it can be read."""
            if not isinstance(weight, QuantizedTensor):
                return weight
            source = getattr(weight, "source", None)
            return weight.dequantize() if source is None else source.read(weight.device)

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kw):
            """Take a patched weight: quantized again, or rounded to the dtype it is kept in."""
            if isinstance(self.weight, PatchableTensor):
                if self.stored.calibrated and not (inplace_update or return_weight):
                    return None  # its patches are applied at run time: see loras.py
                if (
                    inplace_update and not return_weight
                ):  # from a hook: ComfyUI goes on using the tensor that it passed
                    self.weight.data.copy_(weight)
                    return None
                weight = self.weight.rounded(weight, seed or 0, inplace=True)
            else:
                weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
            if return_weight:
                return weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            return None

        def __getattr__(self, name):
            """Also the tables of the weight, by their names in the state dict: hooks ask for them."""
            if name == "comfy_quant" or name.startswith("weight_"):
                weight = self._parameters.get("weight")
                if isinstance(weight, QuantizedTensor) and name in (found := self.state_dict()):
                    return found[name]
            return super().__getattr__(name)

        def _apply(self, fn, recurse=True):
            return comfy.ops._quantized_apply(self, fn, recurse)

    class QuantizedOps(base):
        class Linear(Quantizing, base.Linear):
            kind = "linear"

            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__(in_features, out_features, False, device, dtype)
                # Unquantized weights have the model's own dtype, as in ComfyUI's other operations.
                self.factory_kwargs = {"device": device, "dtype": dtype}
                if bias:
                    self.bias = torch.nn.Parameter(
                        torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
                    )

            def _load_from_state_dict(self, state_dict, prefix, *args):
                if not self._take(state_dict, prefix, *args):
                    base.Linear._load_from_state_dict(self, state_dict, prefix, *args)

            def forward(self, input, *args, **kwargs):
                form = self.stored and get(self.choice.format)
                if form is None or (form.native is not None and not self.weight_only):
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                plain = not (
                    self.weight_function
                    or self.bias_function
                    or getattr(self, "comfy_force_cast_weights", False)
                )
                return self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=plain)

            def _forward(self, input, weight, bias):
                if isinstance(weight, QuantizedTensor) and self.stored is not None:
                    form = get(self.choice.format)
                    if form.replaces_host(weight.device):
                        return product(form, input, weight, bias, self.weight_only)
                    if self.weight_only:
                        weight = weight.dequantize()
                return super()._forward(input, weight, bias)

        class Conv2d(Quantizing, base.Conv2d):
            kind = "conv2d"

            def __init__(self, *args, device=None, dtype=None, **kwargs):
                super().__init__(*args, device="meta", dtype=dtype, **kwargs)
                self.factory_kwargs = {"device": device, "dtype": dtype}
                if self.bias is not None:
                    self.bias = torch.nn.Parameter(
                        torch.empty(self.bias.shape, device=device, dtype=dtype),
                        requires_grad=False,
                    )

            def _load_from_state_dict(self, state_dict, prefix, *args):
                if self._take(state_dict, prefix, *args):
                    return
                shape = self.weight.shape
                self.weight = torch.nn.Parameter(
                    torch.empty(shape, **self.factory_kwargs), requires_grad=False
                )
                base.Conv2d._load_from_state_dict(self, state_dict, prefix, *args)

            def _conv_forward(self, input, weight, bias):
                if isinstance(weight, QuantizedTensor):
                    weight = weight.to(dtype=input.dtype).dequantize()
                return super()._conv_forward(input, weight, bias)

    return QuantizedOps


def _quantize(weight, choice: Choice, name: str, device: torch.device) -> Packed:
    """Pack one layer's weight on ``device``; errors name the layer."""
    form = get(choice.format)
    try:
        return form.quantize(weight.to(device), measure=True)
    except FormatError as error:
        raise FormatError(f"layer {name}: {error}") from error
    except RuntimeError as error:
        if device.type == "cpu" or not comfy.model_management.is_oom(error):
            raise
    # ComfyUI may unload other models; it raises if that is not enough.
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return form.quantize(weight.to(device), measure=True)
