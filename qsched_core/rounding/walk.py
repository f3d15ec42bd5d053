"""The walk: block after block, the unquantized and the quantized model side by side.

The model's own forward does all the work.  Blocks that are finished hand on the outputs that they
gave when they were, so a pass costs the parts around the blocks and the block at hand; only that
block's moments are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..formats import get
from ..formats.base import FormatError
from ..formats.module import QuantizedLinear
from ..formats.policy import Choice, Policy
from .blocks import Block, Enough, blocks_of, forward_of, map_tensors, stages_of
from .errors import RoundingError
from .folds import Fold, folds_of
from .grid import Grid
from .grids import grid_of, refusal
from .layer import Calibrated, RoundingSettings, calibrate_layer, plain
from .moments import Gathering

SAMPLE_BATCHES, SAMPLE_ROWS = 8, 256  # of inputs that are looked at before the moments are taken
# A layer's weight and bias, by its name.
ParametersOf = Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]

STREAMS = ("fp", "q")  # the unquantized model, and the one whose finished layers are quantized


class States(Protocol):
    """Inputs of a model along its trajectory."""

    def __len__(self) -> int: ...

    @property
    def batch(self) -> int:
        """How many go through the model at once, at most."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def parts(self, size: int) -> list[slice]:
        """All of them in batches of at most ``size``."""
        ...

    def run(self, part: slice) -> Any:
        """What the model's own forward gives for a part, or some of one."""
        ...


class Kept(Protocol):
    """Finished blocks of an earlier walk."""

    def load(self, block: str) -> dict[str, Calibrated] | None: ...

    def save(self, block: str, layers: Mapping[str, Calibrated]) -> None: ...


@dataclass(frozen=True)
class BlockDone:
    """Block ``index`` of ``total`` is finished, or was found finished (``resumed``)."""

    index: int
    total: int
    name: str
    resumed: bool
    seconds_left: float


def parameters_in(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer, as they are."""
    layer = model.get_submodule(name)
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def choices(model: nn.Module, policy: Policy) -> dict[str, Choice]:
    """What ``policy`` chooses for each linear layer that it quantizes, in the model's order."""
    chosen = {
        name: policy(name, tuple(layer.weight.shape), "linear")
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return {name: choice for name, choice in chosen.items() if choice.format is not None}


@contextmanager
def quantized(
    model: nn.Module,
    layers: Mapping[str, Calibrated],
    chosen: Mapping[str, Choice],
    device: torch.device | None = None,
) -> Iterator[None]:
    """Inside, the model's ``layers`` compute with what they were rounded to, on ``device``.

    None: where each layer's packing is.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            placed = layer if device is None else layer.to(device)
            form = QuantizedLinear(placed.packed, placed.bias, chosen[name])
            stack.enter_context(forward_of(model.get_submodule(name), form.forward))
        yield


@torch.no_grad()
def calibrate_module(
    model: nn.Module,
    states: States,
    policy: Policy | str,
    settings: RoundingSettings | None = None,
    kept: Kept | None = None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    parameters_of: ParametersOf | None = None,
) -> dict[str, Calibrated]:
    """Every linear layer that ``policy`` quantizes, rounded for the inputs that ``states`` give it.

    ``model`` is unquantized and stays so.  ``parameters_of(name)`` gives a layer's weight and
    bias on the device where they are to be worked on; None: the module's own, where they lie.  The
    result is on the CPU.
    Layers outside of blocks are rounded plainly.  Blocks that ``kept`` has are not done again.
    RoundingError or FormatError names the layer that can't be rounded.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    settings = settings or RoundingSettings()
    chosen = choices(model, policy)
    if not chosen:
        raise RoundingError(f"format={policy.format!r} chooses no linear layer of the model")
    if all(refusal(choice.format) for choice in chosen.values()):
        grid_of(policy.format)  # says why
    return _Walk(model, states, chosen, settings, parameters_of).run(kept, on_block)


class _Walk:
    def __init__(
        self, model, states: States, chosen: Mapping[str, Choice], settings, parameters_of
    ):
        self.model, self.states, self.chosen, self.settings = model, states, chosen, settings
        self.parameters_of = parameters_of or partial(parameters_in, model)
        self.parts = states.parts(states.batch)
        self.device = states.device
        self.blocks = blocks_of(model, lambda: states.run(slice(0, 1)))
        # outputs[stream][block][batch]
        self.outputs: dict[str, dict[int, list[Any]]] = {stream: {} for stream in STREAMS}
        self.done: dict[str, Calibrated] = {}

    def run(self, kept: Kept | None, on_block) -> dict[str, Calibrated]:
        inside = [name for block in self.blocks for name in self.layers_in(block)]
        for name in self.chosen.keys() - set(inside):
            self.done[name] = self.plainly(name, "it is outside of the blocks").to("cpu")
        began, walked = time.monotonic(), 0
        for k, block in enumerate(self.blocks):
            found = None if kept is None else kept.load(block.name)
            resumed = found is not None
            if found is None:
                found = self.calibrated(k, block)
                walked += 1
                if kept is not None:
                    kept.save(block.name, found)
            self.done.update({name: layer.to("cpu") for name, layer in found.items()})
            if k + 1 < len(self.blocks):
                self.hand_on(k, block)
            left = (time.monotonic() - began) / max(1, walked) * (len(self.blocks) - k - 1)
            on_block(BlockDone(k, len(self.blocks), block.name, resumed, left))
        return {name: self.done[name] for name in self.chosen}

    def layers_in(self, block: Block) -> list[str]:
        return [name for name in self.chosen if f"{name}.".startswith(f"{block.name}.")]

    def plainly(self, name: str, note: str) -> Calibrated:
        try:
            return plain(get(self.chosen[name].format), *self.parameters_of(name), note)
        except FormatError as error:
            raise FormatError(f"layer {name}: {error}") from error

    def calibrated(self, k: int, block: Block) -> dict[str, Calibrated]:
        """The layers of block ``k``, stage after stage."""
        names = self.layers_in(block)
        found: dict[str, Calibrated] = {}
        modules = {name: self.model.get_submodule(name) for name in names}
        stages = stages_of(modules, lambda: self.states.run(slice(0, 1)))
        ran = {name for stage in stages for name in stage}
        for name in names:
            reason = refusal(self.chosen[name].format)
            if name not in ran:
                found[name] = self.plainly(name, "it does not run")
            elif reason is not None:
                found[name] = self.plainly(name, reason)
        folds = self.folds(k, block, modules, stages, found)
        for stage in stages:
            wanted = {name: calls for name, calls in stage.items() if name not in found}
            if not wanted:
                continue
            grids, shifts = self.prepared(k, wanted, found, folds)
            for name, sums in self.gathered(k, wanted, found, grids).items():
                found[name] = self.rounded(name, sums, grids[name], shifts.get(name))
        return found

    def grid(self, name: str) -> Grid:
        choice = self.chosen[name]
        return grid_of(choice.format, choice.weight_only)

    def folds(self, k: int, block: Block, modules, stages, found) -> list[Fold]:
        """Where the mean of inputs of block ``k`` may be taken off, for layers that are not ``found``."""
        ran = [name for stage in stages for name in stage if name not in found]
        wanted = [name for name in ran if self.grid(name).looks]

        def run() -> None:
            with ExitStack() as stack:
                stack.callback(block.module.register_forward_hook(_enough).remove)
                self.forward(k, 0, "fp", {}, stack)

        return folds_of(modules, stages, wanted, block.module, run) if wanted else []

    def prepared(self, k: int, names: Mapping[str, int], found: dict[str, Calibrated], folds):
        """Grids of layers (name: calls) that suit their inputs, and the means that are taken off.

        Those are taken off here, from what ``found`` has of the layers before.
        """
        grids, shifts = {name: self.grid(name) for name in names}, {}
        looked = {name: calls for name, calls in names.items() if grids[name].looks}
        samples = self.sampled(k, looked, found) if looked else {}
        for fold in folds:
            if set(fold.consumers) <= samples.keys():
                mean = torch.cat([samples[name] for name in fold.consumers]).mean(0)
                found.update(fold.taken_off(found, mean))
                for name in fold.consumers:
                    samples[name] -= mean
                    shifts[name] = mean
        return grids | {name: grids[name].suited(x) for name, x in samples.items()}, shifts

    def sampled(self, k: int, names: Mapping[str, int], found) -> dict[str, torch.Tensor]:
        """Some of the quantized model's inputs [rows, in] of layers (name: calls) of block ``k``."""
        step = max(1, len(self.parts) // SAMPLE_BATCHES)
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in range(0, len(self.parts), step):
            for name, calls in self.inputs(k, batch, "q", names, found).items():
                x = torch.cat([call.reshape(-1, call.shape[-1]) for call in calls]).float()
                rows[name].append(x[:: max(1, len(x) // SAMPLE_ROWS)])
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def rounded(self, name: str, sums: Gathering, grid: Grid, shift) -> Calibrated:
        weight, bias = self.parameters_of(name)
        try:
            return calibrate_layer(grid, weight, bias, sums.moments(), self.settings, shift)
        except (RoundingError, FormatError) as error:
            raise type(error)(f"layer {name}: {error}") from error

    def gathered(
        self, k: int, names: Mapping[str, int], found, grids: Mapping[str, Grid]
    ) -> dict[str, Gathering]:
        """Moments of the inputs of layers (name: calls) of block ``k``, of which ``found`` are done."""
        sums = {name: Gathering() for name in names}
        for batch in range(len(self.parts)):
            inputs = {
                stream: self.inputs(k, batch, stream, names, found if stream == "q" else {})
                for stream in STREAMS
            }
            for name in names:
                pairs = [inputs[stream][name] for stream in STREAMS]
                try:
                    if len(pairs[0]) != len(pairs[1]):
                        raise RoundingError("it runs more often in one model than in the other")
                    for fp, q in zip(*pairs, strict=True):
                        sums[name].add(*grids[name].pair(q, fp))
                except RoundingError as error:
                    raise RoundingError(f"layer {name}: {error}") from None
        return sums

    def inputs(self, k: int, batch: int, stream: str, names, found) -> dict[str, list]:
        """What layers (name: calls) of block ``k`` are given, call by call."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        block = self.blocks[k].module

        with ExitStack() as stack:
            for name in names:

                def watch(module, arguments, name=name):
                    seen[name].append(arguments[0].detach().clone())
                    if all(len(seen[name]) >= calls for name, calls in names.items()):
                        raise Enough

                layer = self.model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(watch).remove)
            stack.callback(block.register_forward_hook(_enough).remove)
            self.forward(k, batch, stream, found, stack)
        return seen

    def hand_on(self, k: int, block: Block) -> None:
        """Keep the outputs of block ``k``, and let go of those that no later block needs."""
        layers = {name: self.done[name] for name in self.layers_in(block)}
        for stream in STREAMS:
            kept = self.outputs[stream][k] = []

            def keep(module, arguments, output, kept=kept):
                kept.append(map_tensors(output, lambda t: t.detach().to("cpu", copy=True)))
                raise Enough

            for batch in range(len(self.parts)):
                with ExitStack() as stack:
                    stack.callback(block.module.register_forward_hook(keep).remove)
                    self.forward(k, batch, stream, layers if stream == "q" else {}, stack)
            for j, old in enumerate(self.blocks[:k]):
                if old.last_use <= k:
                    self.outputs[stream][j] = [_emptied(tree) for tree in self.outputs[stream][j]]

    def forward(self, k: int, batch: int, stream: str, found, stack: ExitStack) -> None:
        """One pass up to the end of block ``k``; ``found``: its layers that are quantized."""
        for j, block in enumerate(self.blocks[:k]):
            output = self.outputs[stream][j][batch]

            def stub(*arguments, output=output, **named):
                return map_tensors(output, lambda t: t.to(self.device, copy=True))

            stack.enter_context(forward_of(block.module, stub))
        if stream == "q":
            outside = {n: layer for n, layer in self.done.items() if self.is_outside(n)}
            layers = {**outside, **found}
            stack.enter_context(quantized(self.model, layers, self.chosen, self.device))
        try:
            self.states.run(self.parts[batch])
        except Enough:
            return
        raise RoundingError(f"block {self.blocks[k].name} ran on the first state but not on others")

    def is_outside(self, name: str) -> bool:
        return not any(f"{name}.".startswith(f"{block.name}.") for block in self.blocks)


def _enough(module, arguments, output) -> None:
    raise Enough


def _emptied(tree: Any) -> Any:
    """``tree`` with tensors that have the same shape and no memory."""
    return map_tensors(tree, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape))


__all__ = ["BlockDone", "Kept", "States", "calibrate_module", "choices", "quantized"]
