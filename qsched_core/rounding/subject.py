"""What is rounded: an unquantized model, how it is run, and how it runs with other weights."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..prompts import PromptSet
from ..source import ModelSource
from ..task import Task, TaskSource
from .errors import RoundingError
from .file import RoundedWeights
from .states import RecordedStates
from .walk import check_unquantized, parameters_in, quantized


class Subject(ABC):
    """An unquantized model: ``source`` samples it, and runs ``module``, whose layers are rounded.

    RoundingError for a module that is quantized already.
    """

    def __init__(self, source: ModelSource, module: nn.Module):
        self.source, self.module = source, module
        check_unquantized(module)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON of all that a walk depends on: the model, its weights and its trajectory."""

    @abstractmethod
    def rounded(self, weights: RoundedWeights) -> AbstractContextManager[ModelSource]:
        """The source of the model with ``weights``."""

    def parameters_of(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a layer, on the device where they are to be rounded."""
        return parameters_in(self.module, name)

    def states(
        self,
        prompts: PromptSet,
        per_prompt: int,
        seed: int,
        on_prompts: Callable[[float, int], None] = lambda done, total: None,
    ) -> RecordedStates:
        return RecordedStates(
            self.source, self.module, prompts, per_prompt, seed, self.of_call, on_prompts
        )

    def of_call(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Of the named arguments of ``module`` those that belong to a call, not to its rows."""
        return {}


class TaskSubject(Subject):
    """A plain-torch task; RoundingError if it has no module."""

    def __init__(self, task: Task):
        if task.module is None:
            raise RoundingError(
                "the task has no module; give Task(..., module=...) the torch module that denoise runs"
            )
        super().__init__(TaskSource(task, 0), task.module)
        self.task = task

    def describe(self) -> dict[str, Any]:
        sampling = self.task.trajectory.describe()
        return {
            "task": dict(self.task.provenance),
            "sampling": sampling | {"width": self.task.width, "height": self.task.height},
            "weights": digest(self.module),
        }

    @contextmanager
    def rounded(self, weights: RoundedWeights) -> Iterator[ModelSource]:
        with quantized(self.module, weights.layers, weights.chosen, self.device):
            yield self.source

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) of every tensor of the model, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
