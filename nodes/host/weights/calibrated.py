"""Weights of a MODEL of ComfyUI (0.30.0) rounded for the inputs that its prompts give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import torch

from ....qsched_core.files import check_room, write_atomic
from ....qsched_core.prompts import PromptSet
from ....qsched_core.rounding import (
    Limits,
    Progress,
    RecordedStates,
    RoundedWeights,
    RoundingError,
    Subject,
)
from ....qsched_core.schedule.naming import filled, model_parts
from ....qsched_core.source import ModelSource
from ..folders import output_path
from ..source import ComfySource
from .loading import Request, check_model, quantize_model
from .provenance import file_of, unpatched_state

MOST_MEMORY = 6 << 30  # bytes of the device for sums and their rounding: FLUX's largest layers
# Arguments of ComfyUI's models that belong to a call, not to its rows.
CALL_ARGUMENTS = ("transformer_options", "control")


class ComfySubject(Subject):
    """The model of ``source``; ``source_of(model)`` gives the like of a quantized one.

    LoRAs on the model are rounded with the weights.  FormatError for a model that is quantized, and
    for a format that can't run here.
    """

    def __init__(
        self, source: ComfySource, request: Request, source_of: Callable[[Any], ComfySource]
    ):
        self.model, self.request, self.source_of = source.model, request, source_of
        check_model(self.model)
        request.check_device(self.model.load_device)
        super().__init__(source, self.model.model.diffusion_model)
        self._unpatched: Mapping[str, torch.Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        return dict(self.source.describe())

    def states(
        self,
        prompts: PromptSet,
        per_prompt: int,
        seed: int,
        on_prompts: Callable[[float, int], None] = lambda done, total: None,
    ) -> RecordedStates:
        found = super().states(prompts, per_prompt, seed, on_prompts)
        # The walk runs the module itself.  What does not fit beside its sums stays in the host's
        # memory, and comes to the device layer by layer.
        room = min(MOST_MEMORY, self._total_memory() // 2)
        comfy.model_management.load_models_gpu([self.model], memory_required=room)
        self._unpatched = unpatched_state(self.model)
        return found

    def _total_memory(self) -> int:
        return int(comfy.model_management.get_total_memory(self.model.load_device))

    def limits(self, on_progress: Callable[[Progress], None]) -> Limits:
        """What a walk may take here; the user's interrupt is raised inside it."""
        return Limits(
            memory=min(MOST_MEMORY, self._total_memory() // 2),
            out_of_memory=(comfy.model_management.OOM_EXCEPTION,),
            check=comfy.model_management.throw_exception_if_processing_interrupted,
            on_progress=on_progress,
        )

    def of_call(self, named: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: named[key] for key in CALL_ARGUMENTS if key in named}
        options = found.get("transformer_options")
        if isinstance(options, Mapping):
            # Blocks that are left out would be waited for.
            found["transformer_options"] = {**options, "prefetch_dynamic_vbars": False}
        return found

    def parameters_of(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In full precision, on the device that computes, with the model's LoRAs."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight = self._parameter(f"diffusion_model.{name}.weight")
        if self.module.get_submodule(name).bias is None:
            return weight, None
        return weight, self._parameter(f"diffusion_model.{name}.bias")

    def _parameter(self, key: str) -> torch.Tensor:
        if self._unpatched is None:
            self._unpatched = unpatched_state(self.model)
        value, device = self._unpatched[key].detach(), self.model.load_device
        if key not in self.model.patches:
            return value.to(device)
        value = value.to(device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(self.model.patches[key], value, key)

    def rounded(self, weights: RoundedWeights) -> AbstractContextManager[ModelSource]:
        self._unpatched = None  # another model comes to the device: this one's tensors may move
        return nullcontext(self.source_of(self.with_weights(weights)))

    def with_weights(self, weights: RoundedWeights):
        """The MODEL with ``weights``, as its user gets it; the walk's bar goes on meanwhile."""
        return quantize_model(self.model, self.request, rounded=weights, drawn=False)


@dataclass(frozen=True)
class ReportFile:
    """Where the report of calibrated weights goes: ``name`` in the output folder, "" for nowhere.

    {model} and {format} are filled in.  RoundingError for a name that is no file's, before any work.
    """

    name: str
    model: str  # the file that it comes from
    format: str

    @classmethod
    def of(cls, name: str, model, weight_format: str) -> ReportFile:
        made = cls(name, file_of(model), weight_format)
        if name:
            check_room(made._path(1))
        return made

    def save(self, page: str) -> list[Path]:
        """Write ``page``; its path, if it was to be written.

        Another report of that name stays: this one gets a number.
        """
        for number in count(1) if self.name else ():
            path = self._path(number)
            try:
                return [write_atomic(path, page, overwrite=False)]
            except FileExistsError:
                if path.is_file() and path.read_bytes() == page.encode():
                    return [path]
        return []

    def _path(self, number: int) -> Path:
        try:
            name = filled(self.name.removesuffix(".html"), model_parts(self.model, self.format))
        except ValueError as error:
            raise RoundingError(f"report_name: {error}") from None
        name = name if number == 1 else f"{name}-{number}"
        return output_path(name, ".html", "report_name", RoundingError)
