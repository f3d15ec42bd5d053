"""A GPU that is not there: tensors that say they are on one, and refuse what CUDA refuses.

The values are on the CPU and so is the arithmetic.  What this finds without a GPU is a tensor that
was left on the other side: an operation on tensors of two devices raises, as it does on CUDA, but
for what CUDA allows (single numbers, and indexes).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXES = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class OnGPU(torch.Tensor):
    """A tensor on the GPU that is not there; ``inner`` has its values, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        out.inner = inner
        return out

    def __repr__(self):
        return f"OnGPU({self.inner})"

    # What Python asks a tensor for, past the dispatcher.
    def tolist(self):
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu()")

    # Where its values are: who asks compares addresses.
    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


# Its name is the one of what it stands for: who looks for tensors of a strange kind finds none here.
OnGPU.__name__ = "Tensor"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


def _computes_itself(kind: type) -> bool:
    """Whether this is a tensor with arithmetic of its own, such as ComfyUI's QuantizedTensor."""
    plain = torch._C._disabled_torch_dispatch_impl
    return not issubclass(kind, OnGPU) and getattr(kind, "__torch_dispatch__", plain) is not plain


def _run(func, types, args, kwargs):
    if any(map(_computes_itself, types)):
        return NotImplemented
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnGPU)]
    here = [t for t in tensors if not isinstance(t, OnGPU) and t.ndim]
    if (
        there
        and here
        and func not in MOVES
        and not (func in INDEXES and _is_one_of(args[0], there))
    ):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}"
        )
    asked = kwargs.get("device")
    if asked is None:  # some operations take it by its place
        asked = next((value for value in args if isinstance(value, torch.device)), None)
    if asked is None:
        on_gpu = bool(there) and (
            func is not torch.ops.aten.copy_.default or _is_one_of(args[0], there)
        )
    else:
        on_gpu = torch.device(asked).type == "cuda"
    moved = {**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs
    inner = tree_map(_on_cpu, (args, moved))
    out = func(*inner[0], **inner[1])
    if _written(func):  # in place: the same tensor comes back
        return args[0]
    if not on_gpu:
        return out
    return tree_map(lambda t: OnGPU(t) if isinstance(t, torch.Tensor) else t, out)


def _on_cpu(value):
    if isinstance(value, torch.device):
        return CPU
    return value.inner if isinstance(value, OnGPU) else value


def _is_one_of(tensor, tensors) -> bool:
    return any(tensor is other for other in tensors)


def _written(func) -> bool:
    first = func._schema.arguments[0] if func._schema.arguments else None
    returns = func._schema.returns
    alias = first and first.alias_info
    return bool(alias and alias.is_write and len(returns) == 1 and returns[0].alias_info)


def _replace(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """``parameter.data = value``: it is on the GPU then, if the value is."""
    torch.Tensor.data.__set__(parameter, value)
    if isinstance(value, OnGPU):
        parameter.__class__, parameter.inner = OnGPU, value.inner
        parameter._is_param = True


@contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Inside, ``torch.device("cuda:0")`` can be used for tensors."""
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing where there is no GPU
    before = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new ones
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes and then moves
    generator = torch.Generator
    data = property(torch.Tensor.data.__get__, _replace)
    try:
        with (
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            patch.object(torch.cuda, "synchronize", lambda *_: None),
            patch.object(torch, "Generator", lambda device=None: generator()),
            patch.object(torch.nn.Parameter, "data", data, create=True),
            _Mode(),
        ):
            yield GPU
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
