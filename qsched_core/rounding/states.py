"""States of a task's trajectory: what the model will be run on, drawn from (prompt, step) pairs."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from ..prompts import PromptSet
from ..task import Task, TaskSource
from .blocks import Enough, tensors_of
from .errors import RoundingError


class TaskStates:
    """The latents that the unquantized model gets for ``prompts``, step by step.

    ``per_prompt`` random steps of each prompt are taken (0: all of them); more prompts with fewer
    steps each serve better than the same number of states of fewer prompts.  ``evaluations`` counts
    the latents that went through the model to find them.
    """

    def __init__(self, task: Task, prompts: PromptSet, per_prompt: int = 0, seed: int = 0):
        steps = task.trajectory.steps
        if not 0 <= per_prompt <= steps:
            raise RoundingError(
                f"states_per_prompt={per_prompt} must be 0 (all) to {steps}, the trajectory's steps"
            )
        self.task, self.batch = task, task.max_batch
        source = TaskSource(task, 0)
        latents, levels = [], ()
        for start in range(0, len(prompts), task.max_batch):
            part = prompts.part(start, start + task.max_batch)
            try:
                seen = source.observed(part)
            except ValueError as error:
                name = None if task.module is None else _not_finite(task.module, source, part)
                if name is None:
                    raise
                raise RoundingError(
                    f"layer {name} gives NaN or infinite values ({error}); compute the model in bf16 "
                    "or fp32, or use a sound copy of it"
                ) from None
            latents.append(torch.stack(seen.latents, 1))
            levels = seen.sigmas
        self.evaluations = source.nfe
        latents = torch.cat(latents)  # [prompts, steps, ...]
        order = torch.Generator().manual_seed(seed)
        pairs = [
            (prompt, step)
            for prompt in range(len(prompts))
            for step in sorted(
                torch.randperm(len(levels), generator=order)[: per_prompt or None].tolist()
            )
        ]
        self._prompt = torch.tensor([prompt for prompt, _ in pairs])
        step = torch.tensor([step for _, step in pairs])
        self._latents = latents[self._prompt, step]
        self._levels = torch.tensor(levels)[step]
        self._extra = dict(task.condition(prompts.prompts))
        self._count = len(prompts)
        self._device = task.initial(prompts.seeds[:1]).device

    def __len__(self) -> int:
        return len(self._prompt)

    @torch.no_grad()
    def run(self, part: slice) -> None:
        rows = self._prompt[part]
        extra = {key: self._rows(value, rows) for key, value in self._extra.items()}
        self.task.denoise(
            self._latents[part].to(self._device), self._levels[part].to(self._device), **extra
        )

    def _rows(self, value: Any, rows: torch.Tensor) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == self._count:
            return value[rows.to(value.device)]
        return value


def _not_finite(model: nn.Module, source: TaskSource, prompts: PromptSet) -> str | None:
    """The first of the model's layers whose output is not finite, or None."""
    found: list[str] = []
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if next(layer.children(), None) is None:

                def check(module, arguments, output, name=name):
                    if not all(torch.isfinite(t).all() for t in tensors_of(output)):
                        found.append(name)
                        raise Enough

                hooks.callback(layer.register_forward_hook(check).remove)
        with suppress(Enough, ValueError):
            source.observed(prompts)
    return found[0] if found else None
