"""The walk: block after block, the unquantized and the quantized model side by side.

The model's own forward does all the work.  Blocks that are finished hand on the outputs that they
gave when they were, so a pass costs the parts around the blocks and the block at hand; only that
block's moments are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from ..formats import get
from ..formats.base import FormatError, check_finite
from ..formats.policy import Choice, Policy
from .blocks import Block, Enough, blocks_of, stages_of
from .errors import RoundingError
from .folds import Fold, folds_of
from .grid import Grid
from .grids import grid_of, refusal
from .layer import Calibrated, RoundingSettings, calibrate_layer, plain
from .layers import columns_of, keeps_inputs, kind_of, rows_of, unable
from .moments import Gathering
from .pace import Pace, Progress
from .passes import FP, ONE_STATE, Limits, Passes, Q, States, quantized
from .plan import Need, calls_of, check_rows, finer, needs, survey, turns

# A layer's weight and bias, by its name.
ParametersOf = Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]

OUTSIDE = "it is outside of the blocks and does not run just once"
SAMPLE_BATCHES, SAMPLE_ROWS = 8, 256  # of inputs that are looked at before the moments are taken
LISTS = (nn.ModuleList, nn.ModuleDict)  # whose items are blocks
STAGES = 3  # of a block that was not looked at yet


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


def choices(model: nn.Module, policy: Policy, calibrated: bool = True) -> dict[str, Choice]:
    """What ``policy`` chooses for each layer that it quantizes, in the model's order.

    A ``calibrated`` modulation layer has the base format, unless the policy names another: its inputs
    are few, one a noise level and prompt, so calibrated it errs least of all.  On the demo model (64
    prompts calibrate, 128 judge) int2 there gives a distance of .00668 to the unquantized model, and
    nf4, of .55 bits a weight more, .00652; int3 .00132 and .00135.  Sampled in 8 steps instead of 4,
    .0074 against .0070.  With a part of the inputs that differs by caption as much as by noise level,
    the layer itself errs .005 on new captions with int2, and .019 with nf4 rounded plainly.  On a CPU
    int2 unpacks more slowly: a step of the demo model takes 8 % longer than with nf4 there.  Outside
    of lists of blocks a layer may be rounded plainly, so there the plain rule holds.
    """
    lists = [n for n, module in model.named_modules() if isinstance(module, LISTS)]
    inside = tuple(f"{name}." for name in lists) if calibrated else ()
    own = replace(policy, modulation=policy.modulation or policy.format)
    chosen = {}
    for name, layer in model.named_modules():
        kind = kind_of(layer)
        if kind is not None:
            rule = own if f"{name}.".startswith(inside) else policy
            chosen[name] = rule(name, tuple(layer.weight.shape), kind)
    return {name: choice for name, choice in chosen.items() if choice.format is not None}


@torch.no_grad()
def calibrate_module(
    model: nn.Module,
    states: States,
    policy: Policy | str | Mapping[str, Choice],
    settings: RoundingSettings | None = None,
    kept: Kept | None = None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    parameters_of: ParametersOf | None = None,
    limits: Limits | None = None,
) -> dict[str, Calibrated]:
    """Every layer that ``policy`` quantizes, rounded for the inputs that ``states`` give it.

    ``policy`` may be the choices themselves, by layer.  ``model`` is unquantized and stays so.
    ``parameters_of(name)`` gives a layer's weight and bias on the device where they are to be worked
    on; None: the module's own, where they lie.  The result is on the CPU.  A layer outside of all
    blocks is a block of its own; one there that does not run just once is rounded plainly.  Blocks
    that ``kept`` has are not done again.

    Where the device has too little memory for a batch, batches are halved; then sums are in another
    order, and grids that look at inputs first look at others.  RoundingError, FormatError or
    DiskError before the walk for what can't be rounded, on the way naming the layer.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    settings, limits = settings or RoundingSettings(), limits or Limits()
    check_unquantized(model)
    chosen = choices(model, policy) if isinstance(policy, Policy) else dict(policy)
    if not chosen:
        asked = f"format={policy.format!r}" if isinstance(policy, Policy) else "the choice"
        raise RoundingError(f"{asked} chooses no layer of the model")
    if all(refusal(choice.format) for choice in chosen.values()):
        worst = policy.format if isinstance(policy, Policy) else next(iter(chosen.values())).format
        grid_of(worst)  # says why
    return _Walk(model, states, chosen, settings, parameters_of, limits).run(kept, on_block)


def check_unquantized(model: nn.Module) -> None:
    """RoundingError names a layer that is quantized already."""
    for name, layer in model.named_modules():
        if hasattr(layer, "packed"):
            raise RoundingError(f"layer {name} is quantized already; give the unquantized model")


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        states: States,
        chosen: Mapping[str, Choice],
        settings: RoundingSettings,
        parameters_of: ParametersOf | None,
        limits: Limits,
    ):
        self.model, self.states, self.chosen = model, states, chosen
        self.settings, self.limits = settings, limits
        self.parameters_of = parameters_of or partial(parameters_in, model)
        for form in sorted({choice.format for choice in chosen.values()}):
            reason = get(form).available(states.device)
            if reason is not None:
                raise FormatError(f"format={form!r} can't run on {states.device}: {reason}")
        for name in chosen:
            self.check_weight(name)
        self.blocks = blocks_of(model, self.first_state, chosen)
        self.done: dict[str, Calibrated] = {}
        self.passes = Passes(model, states, self.blocks, chosen, self.done, (FP, Q), limits)
        self.layers_in = self.passes.layers_in
        inside = [name for name in chosen if name not in self.passes.outside]
        modules = {n: model.get_submodule(n) for n in inside if self.refusal(n) is None}
        self.seen = survey(modules, self.first_state)
        shapes = {n: (len(layer.weight), columns_of(layer)) for n, layer in modules.items()}
        self.need: dict[str, Need] = needs(shapes, limits.memory)
        remark = check_rows(self.seen, {n: s[1] for n, s in shapes.items()}, len(states))
        if remark:
            limits.tell(remark)
        self.stages = STAGES
        works = [self.work_of(block) for block in self.blocks]
        self.pace = Pace([b.name for b in self.blocks], works, limits.on_progress)

    def check_weight(self, name: str) -> None:
        try:
            check_finite(self.parameters_of(name)[0])
        except FormatError as error:
            raise FormatError(f"layer {name}: {error}") from None

    def first_state(self) -> None:
        self.limits.check()
        try:
            self.states.run(slice(0, 1))
        except self.limits.out_of_memory as error:
            raise RoundingError(f"the model does not fit into memory with {ONE_STATE}") from error

    def work_of(self, block: Block) -> float:
        """Of one block, in flops, about."""
        needs = {name: self.need[name] for name in self.layers_in(block) if name in self.need}
        moments = sum(4.0 * self.rows(n) * need.columns * need.width for n, need in needs.items())
        passes = 2 * (self.stages + 1) * self.pass_of(block) * len(self.states)
        return passes + moments * len(self.states) + sum(need.flops for need in needs.values())

    def pass_of(self, block: Block) -> float:
        """Of running one state through it."""
        needs = {name: self.need[name] for name in self.layers_in(block) if name in self.need}
        return sum(2.0 * self.rows(n) * need.rows * need.columns for n, need in needs.items())

    def rows(self, name: str) -> int:
        return self.seen[name].rows if name in self.seen else 0

    def step(self, work: float) -> None:
        self.limits.check()
        self.pace.step(work)

    def run(self, kept: Kept | None, on_block) -> dict[str, Calibrated]:
        with self.passes.kept():
            self.walk(kept, on_block)
        return {name: self.done[name] for name in self.chosen}

    def walk(self, kept: Kept | None, on_block) -> None:
        for name in self.passes.outside:
            self.done[name] = self.plainly(name, OUTSIDE).to("cpu")
        for k, block in enumerate(self.blocks):
            self.limits.check()
            self.pace.begin(k, self.work_of(block))
            found = None if kept is None else kept.load(block.name)
            resumed = found is not None
            if found is None:
                found = self.calibrated(k, block)
                if kept is not None:
                    kept.save(block.name, found)
            self.done.update({name: layer.to("cpu") for name, layer in found.items()})
            if k + 1 < len(self.blocks):
                self.passes.retried(k, partial(self.passes.hand_on, k, partial(self.handed, block)))
            on_block(BlockDone(k, len(self.blocks), block.name, resumed, self.pace.end(resumed)))

    def handed(self, block: Block, part: slice) -> None:
        self.step(2 * self.pass_of(block) * (part.stop - part.start))

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
        stages = stages_of(modules, self.first_state)
        ran = {name for stage in stages for name in stage}
        for name in names:
            reason = self.refusal(name)
            if name not in ran:
                found[name] = self.plainly(name, "it does not run")
            elif reason is not None:
                found[name] = self.plainly(name, reason)
        todo = [{n: c for n, c in stage.items() if n not in found} for stage in stages]
        groups = [turns(list(stage), self.need, self.limits.memory) for stage in todo]
        self.stages = sum(map(len, groups))
        self.pace.begin(k, self.work_of(block))
        folds = self.folds(k, block, modules, stages, found)
        for stage, in_turn in zip(todo, groups, strict=True):
            if not stage:
                continue
            grids, shifts = self.prepared(k, stage, found, folds)
            done = dict(found)  # layers of a stage are seen with none of that stage rounded
            for group in in_turn:
                names = {name: stage[name] for name in group}
                found.update(self.group(k, names, done, grids, shifts))
        return found

    def refusal(self, name: str) -> str | None:
        """Why a layer can't be calibrated, or None."""
        return refusal(self.chosen[name].format) or unable(self.model.get_submodule(name))

    def grid(self, name: str) -> Grid:
        choice, layer = self.chosen[name], self.model.get_submodule(name)
        return grid_of(choice.format, choice.weight_only or keeps_inputs(layer))

    def folds(self, k: int, block: Block, modules, stages, found) -> list[Fold]:
        """Where the mean of inputs of block ``k`` may be taken off, for layers that are not ``found``."""
        ran = [name for stage in stages for name in stage if name not in found]
        wanted = [name for name in ran if self.grid(name).looks]

        def run() -> None:
            self.limits.check()
            with ExitStack() as stack:
                stack.callback(block.module.register_forward_hook(_enough).remove)
                self.passes.to_block(k, self.passes.parts[0], FP, {})

        if not wanted:
            return []
        return self.passes.retried(k, lambda: folds_of(modules, stages, wanted, block.module, run))

    def prepared(self, k: int, names: Mapping[str, int], found: dict[str, Calibrated], folds):
        """Grids of layers (name: calls) that suit their inputs, and the means that are taken off.

        Those are taken off here, from what ``found`` has of the layers before.
        """
        grids, shifts = {name: self.grid(name) for name in names}, {}
        looked = {name: calls for name, calls in names.items() if grids[name].looks}
        samples: dict[str, torch.Tensor] = {}
        if looked:
            samples = self.passes.retried(k, lambda: self.sampled(k, looked, found))
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
        parts = self.passes.parts
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for part in parts[:: max(1, len(parts) // SAMPLE_BATCHES)]:
            for name, calls in self.inputs(k, part, Q, names, found).items():
                x = torch.cat([call.reshape(-1, call.shape[-1]) for call in calls])
                rows[name].append(x[:: max(1, len(x) // SAMPLE_ROWS)].float())
            self.step(self.pass_of(self.blocks[k]) * (part.stop - part.start))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def group(self, k: int, names: Mapping[str, int], done, grids, shifts) -> dict[str, Calibrated]:
        """Layers (name: calls) of block ``k``, of which ``done`` are quantized."""
        found: dict[str, Calibrated] = {}

        def gathered(names: Mapping[str, int]) -> dict[str, Gathering]:
            return self.passes.retried(k, lambda: self.gathered(k, names, done, grids))

        sums = gathered(names)
        for name in names:
            while name not in found:
                try:
                    found[name] = self.rounded(name, sums.pop(name), grids[name], shifts.get(name))
                    continue
                except self.limits.out_of_memory:
                    self.need[name] = finer(self.need[name], name)
                self.passes.relieve()
                sums |= gathered({name: names[name]})
        return found

    def rounded(self, name: str, sums: Gathering, grid: Grid, shift) -> Calibrated:
        need = self.need[name]
        share = need.flops / calls_of(need, self.settings.rounds, self.settings.sweeps)
        try:
            return calibrate_layer(
                grid,
                *self.parameters_of(name),
                sums.parts(),
                self.settings,
                shift,
                spend=True,
                check=lambda: self.step(share),
            )
        except (RoundingError, FormatError) as error:
            raise type(error)(f"layer {name}: {error}") from error

    def gathered(
        self, k: int, names: Mapping[str, int], found, grids: Mapping[str, Grid]
    ) -> dict[str, Gathering]:
        """Moments of the inputs of layers (name: calls) of block ``k``, of which ``found`` are done."""
        sums = {name: Gathering(self.need[name].cuts) for name in names}
        cost = 2 * self.pass_of(self.blocks[k])
        cost += sum(4.0 * self.rows(n) * self.need[n].columns * self.need[n].width for n in names)
        for part in self.passes.parts:
            inputs = {
                stream: self.inputs(k, part, stream, names, found if stream == Q else {})
                for stream in (FP, Q)
            }
            for name in names:
                layer = self.model.get_submodule(name)
                pairs = [inputs[stream].pop(name) for stream in (FP, Q)]
                try:
                    if len(pairs[0]) != len(pairs[1]):
                        raise RoundingError("it runs more often in one model than in the other")
                    for one in zip(*pairs, strict=True):
                        for fp, q in zip(*(rows_of(layer, x) for x in one), strict=True):
                            sums[name].add(*grids[name].pair(q, fp))
                except RoundingError as error:
                    raise RoundingError(f"layer {name}: {error}") from None
            self.step(cost * (part.stop - part.start))
        return sums

    def inputs(self, k: int, part: slice, stream: str, names, found) -> dict[str, list]:
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
            self.passes.to_block(k, part, stream, found)
        return seen


def _enough(module, arguments, output) -> None:
    raise Enough


__all__ = [
    "BlockDone",
    "Kept",
    "Limits",
    "Progress",
    "States",
    "calibrate_module",
    "check_unquantized",
    "choices",
    "quantized",
]
