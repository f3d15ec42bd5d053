"""The Triton kernel as a torch operator.

One that compilers do not look into (so not ``torch.library.triton_op``): what reads the weight is a
matrix product, which nothing can be fused with.  CUDA graphs record it like any other.
"""

from __future__ import annotations

import importlib

import torch

from .codes import GroupedCodes


def _unpack(codes, bits, levels, zero_steps, least_scale, scale, scale_2, zero, columns, dtype):
    launch = importlib.import_module(f"{__package__}.triton_unpack").launch
    spec = GroupedCodes(bits, tuple(levels), zero_steps, least_scale)
    return launch(spec, codes, scale, scale_2, zero, columns, dtype)


def _unpack_shape(codes, bits, levels, zero_steps, least, scale, scale_2, zero, columns, dtype):
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


# Not torch.library.custom_op: see formats/tables.py.
_library = torch.library.Library("qsched", "FRAGMENT")
if not hasattr(torch.ops.qsched, "unpack"):  # this file may be imported under two names
    _library.define(
        "unpack(Tensor codes, SymInt bits, float[] levels, SymInt zero_steps, float? least_scale, "
        "Tensor scale, Tensor scale_2, Tensor? zero, SymInt columns, ScalarType dtype) -> Tensor"
    )
    _library.impl("unpack", _unpack, "CompositeExplicitAutograd")
    _library.impl("unpack", _unpack_shape, "Meta")

_operator = torch.ops.qsched.unpack.default


def unpack(
    spec: GroupedCodes,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scale_2: torch.Tensor,
    zero: torch.Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The first ``columns`` values [rows, columns], in ``dtype``, of codes [rows, bytes].

    Tables are as ``spec`` says; fp32 values are those of the same steps in torch bit for bit, 16-bit
    ones are these rounded once.  Only where ``engine`` chooses Triton; MissingDependencyError or
    Triton's own errors elsewhere.
    """
    return _operator(
        codes,
        spec.bits,
        spec.levels,
        spec.zero_steps,
        spec.least_scale,
        scale,
        scale_2,
        zero,
        columns,
        dtype,
    )
