"""States of a model's trajectory: what its own forward is given, drawn from (prompt, step) pairs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..prompts import PromptSet
from ..source import ModelSource
from .blocks import Enough, map_tensors, tensors_of
from .errors import RoundingError

SAMPLE = 64  # values of a tensor by which equal ones are looked up


@dataclass(frozen=True)
class State:
    """One row of a call of the model's forward.

    ``arguments`` are its positional and its named ones, with one row [1, ...] of each batched tensor,
    on the CPU; ``whole`` are those that belong to the call.  States of one ``kind`` may be in a batch:
    their tensors have the same shapes, and where calls have arguments of their own they are of one
    step.
    """

    arguments: tuple[tuple, dict]
    whole: dict[str, Any]
    kind: tuple


class RecordedStates:
    """What ``module`` is given while the unquantized model samples ``prompts``.

    ``per_prompt`` random steps of each prompt are taken (0: all of them); more prompts with fewer
    steps each serve better than the same number of states of fewer prompts.  With guidance a step
    has a state for the prompt and one for the negative.  ``of_call(named)`` picks the named arguments
    that belong to a call, not to its rows: a batch gets those of its first state.  ``evaluations``
    counts the latents that went through the model to find the states; ``on_prompts(done, total)`` is
    called meanwhile.

    RoundingError for ``per_prompt`` beyond the trajectory's steps, and for a layer that gives NaN.
    """

    def __init__(
        self,
        source: ModelSource,
        module: nn.Module,
        prompts: PromptSet,
        per_prompt: int = 0,
        seed: int = 0,
        of_call: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda named: {},
        on_prompts: Callable[[float, int], None] = lambda done, total: None,
    ):
        steps = source.trajectory.steps
        if not 0 <= per_prompt <= steps:
            raise RoundingError(
                f"states_per_prompt={per_prompt} must be 0 (all) to {steps}, the trajectory's steps"
            )
        self.module, self.batch = module, source.max_batch
        self.device = torch.device("cpu")
        before, order = source.nfe, torch.Generator().manual_seed(seed)
        states: list[tuple[int, State]] = []  # with the prompt's number
        wanted = [
            set(torch.randperm(steps, generator=order)[: per_prompt or None].tolist())
            for _ in prompts.prompts
        ]
        done = 0
        for places in source.alike(prompts):
            own = [wanted[i] for i in places]

            def recorded(
                part: PromptSet, start: int, own=own, before=done
            ) -> list[tuple[int, State]]:
                def stepped(share: float) -> None:
                    on_prompts(before + start + share * len(part), len(prompts))

                return self._recorded(source, part, own[start:], of_call, stepped)

            for start, found in source.batches.each(recorded, prompts.at(places)):
                states += [(places[start + row], state) for row, state in found]
                on_prompts(min(done + start + source.max_batch, len(prompts)), len(prompts))
            done += len(places)
            on_prompts(done, len(prompts))
        if not states:
            raise RoundingError(
                "the module does not run while the model samples; give the module that the source runs"
            )
        states.sort(key=lambda pair: (pair[1].kind, pair[0]))
        self._states = [state for _, state in states]
        self.evaluations = source.nfe - before

    def _recorded(
        self,
        source: ModelSource,
        prompts: PromptSet,
        wanted: Sequence[set[int]],
        of_call,
        on_step: Callable[[float], None],
    ):
        """The states of some prompts, with their rows: of each, those of its ``wanted`` steps.

        ``on_step`` gets the share of the steps that is done.
        """
        found: list[tuple[int, State]] = []
        known: dict[Hashable, torch.Tensor] = {}
        ends = torch.tensor(source.trajectory.sigmas[1:], dtype=torch.float32).tolist()
        step = 0

        def at(sigma: float) -> None:
            nonlocal step
            step = next(i for i, end in enumerate(ends) if sigma > end)
            on_step(step / len(ends))

        def record(module, arguments, named) -> None:
            rest = of_call(named)
            split = (arguments, {key: named[key] for key in named if key not in rest})
            first = tensors_of(split)[0]
            self.device = first.device
            for row in range(len(first)):
                prompt = row % len(prompts)
                if step in wanted[prompt]:
                    state = _state(split, rest, row, len(first), step, known)
                    found.append((prompt, state))

        handle = self.module.register_forward_pre_hook(record, with_kwargs=True)
        try:
            source.observed(prompts, on_evaluation=at)
        except ValueError as error:
            name = _not_finite(self.module, source, prompts)
            if name is None:
                raise
            raise RoundingError(
                f"layer {name} gives NaN or infinite values ({error}); compute the model in bf16 "
                "or fp32, or use a sound copy of it"
            ) from None
        finally:
            handle.remove()
        return found

    def __len__(self) -> int:
        return len(self._states)

    def parts(self, size: int) -> list[slice]:
        """All states in batches of at most ``size``, each of one kind."""
        found, start = [], 0
        for k in range(1, len(self) + 1):
            ends = k == len(self) or self._states[k].kind != self._states[start].kind
            if ends or k - start == size:
                found.append(slice(start, k))
                start = k
        return found

    @torch.no_grad()
    def run(self, part: slice) -> Any:
        """What the module gives for some states, which are of one kind."""
        states = self._states[part]
        rows = [tensors_of(state.arguments) for state in states]
        flags = states[0].kind[-1]
        joined = iter(
            torch.cat(tensors) if batched else tensors[0]
            for tensors, batched in zip(zip(*rows, strict=True), flags, strict=True)
        )
        arguments, named = map_tensors(
            states[0].arguments, lambda _: next(joined).to(self.device, copy=True)
        )
        return self.module(*arguments, **named, **states[0].whole)


def _state(split, whole, row: int, count: int, step: int, known: dict) -> State:
    """Row ``row`` of a call with ``count`` rows; a tensor that is ``known`` is not kept twice."""
    flags: list[bool] = []

    def one(tensor: torch.Tensor) -> torch.Tensor:
        flags.append(tensor.ndim > 0 and len(tensor) == count)
        own = (tensor[row : row + 1] if flags[-1] else tensor).detach()
        step = max(1, own.numel() // SAMPLE)
        sample = tuple(own.reshape(-1)[::step].tolist())
        key = (tuple(own.shape), own.dtype, sample)
        own = own.to("cpu", copy=True)
        if key not in known or not torch.equal(known[key], own):
            known[key] = own
        return known[key]

    arguments = map_tensors(split, one)
    shapes = tuple((tuple(t.shape), str(t.dtype)) for t in tensors_of(arguments))
    return State(arguments, whole, (step if whole else 0, shapes, tuple(flags)))


def _not_finite(model: nn.Module, source: ModelSource, prompts: PromptSet) -> str | None:
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
