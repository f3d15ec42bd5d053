"""What formats of codes in groups share: who unpacks them, and torch's way, the reference."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .. import kernels
from .base import Packed, WeightFormat
from .tables import group_values


class GroupedFormat(WeightFormat):
    """A format whose groups of codes have a scale, and maybe a zero point: see ``GroupedCodes``.

    Tables are "scale", "zero" if ``grouped_codes`` says so, and "scale_2".
    """

    @property
    @abstractmethod
    def grouped_codes(self) -> kernels.GroupedCodes: ...

    def engine(self, device: torch.device, dtype: torch.dtype) -> str:
        """What unpacks a weight to ``dtype`` on ``device``."""
        return kernels.engine(device, dtype)

    def backend(self, device):
        device = torch.device(device)
        return f"{self.engine(device, torch.bfloat16)} {device.type}"

    def _dequantize_rows(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        return self.unpack_by(self.engine(packed.codes.device, dtype), packed, dtype)

    def unpack_by(self, engine: str, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, columns] that the codes stand for, by an engine that can run here."""
        spec, aux, columns = self.grouped_codes, packed.aux, packed.matrix[1]
        if engine == "triton":
            tables = (aux["scale"], aux["scale_2"], aux.get("zero"))
            return kernels.unpack(spec, packed.codes, *tables, columns, dtype)
        scale, low = aux["scale"].float() * aux["scale_2"], None
        if spec.least_scale is not None:
            scale = scale.clamp_(min=spec.least_scale)
        if spec.zero_steps:
            low = -(aux["zero"].float() / spec.zero_steps) * scale
        return group_values(packed.codes, spec.levels, spec.bits, scale, low, columns, dtype)
