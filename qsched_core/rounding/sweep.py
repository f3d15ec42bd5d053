"""What each layer's rounding costs the model's output: one layer at a time, all others unquantized.

A layer is rounded for the unquantized model's inputs in every format of the ladder, and the model is
run with the smallest of them in its place.  What the others cost follows from the layer's own output
error, which a small change of the model's output goes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..formats import get
from ..formats.policy import Choice
from .blocks import Enough, blocks_of, tensors_of
from .budget import LayerCost, Option
from .errors import RoundingError
from .grids import grid_of
from .layer import Calibrated, RoundingSettings, calibrate_layer, plain
from .moments import Gathering
from .passes import FP, Limits, Passes, States
from .plan import Need, finer, needs, survey, turns
from .walk import ParametersOf

SAMPLE_ROWS = 2048  # of a layer's inputs, on which its formats are compared


class Sweep:
    """The costs of layers (``chosen``) of ``model`` on ``states``.

    ``fixed`` layers keep their format and are not measured; the others' formats are those of
    ``ladder``.  ``known`` costs are not measured again.
    """

    def __init__(
        self,
        model: nn.Module,
        states: States,
        chosen: Mapping[str, Choice],
        fixed: Sequence[str],
        ladder: Sequence[str],
        settings: RoundingSettings,
        parameters_of: ParametersOf,
        limits: Limits,
    ):
        self.model, self.states, self.limits = model, states, limits
        self.parameters_of = parameters_of
        # One pass over a weight: rounds of improvement change all formats alike.
        self.settings = replace(settings, target=0.0, rounds=0)
        shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in chosen}
        self.options: dict[str, list[str]] = {}
        for name, choice in chosen.items():
            fitting = [f for f in ladder if get(f).unfit(shapes[name]) is None]
            forms = [choice.format] if name in fixed or not fitting else fitting
            size = {form: get(form).packed_bytes(shapes[name]) for form in forms}
            self.options[name] = sorted(forms, key=size.__getitem__)
        self.shapes, self.weight_only = shapes, {n: c.weight_only for n, c in chosen.items()}
        tried = {
            name: Choice(forms[0], self.weight_only[name]) for name, forms in self.options.items()
        }
        self.measured = [name for name, forms in self.options.items() if len(forms) > 1]
        self.blocks = blocks_of(model, self.first_state)
        self.passes = Passes(model, states, self.blocks, tried, {}, (FP,), limits)
        modules = {name: model.get_submodule(name) for name in self.measured}
        self.seen = survey(modules, self.first_state)
        self.need: dict[str, Need] = needs(
            {name: shapes[name] for name in self.measured}, limits.memory
        )
        self.reference: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.evaluations = 0.0

    def first_state(self) -> None:
        self.states.run(slice(0, 1))

    def layers_in(self, k: int | None) -> list[str]:
        """Measured layers that run, of block ``k`` or (None) of none."""
        inside = self.passes.outside if k is None else self.passes.layers_in(self.blocks[k])
        return [name for name in inside if name in self.seen]

    def predicted(self, known: Mapping[str, LayerCost]) -> float:
        """Model evaluations (of one state) that it takes."""
        total = len(self.blocks)
        places: list[int | None] = [None, *range(total)]
        found = 1.0  # the reference
        for k in places:
            left = [name for name in self.layers_in(k) if name not in known]
            found += len(left) * (1 if k is None else (total - k) / total)
            found += (1 if k is None else 1 / total) if left else 0
        return (found + 1) * len(self.states)  # one more hands on

    def run(
        self,
        known: Mapping[str, LayerCost],
        on_layers: Callable[[int, int], None],
        keep: Callable[[Mapping[str, LayerCost]], None],
    ) -> dict[str, LayerCost]:
        """Costs of all layers, in the order of ``chosen``.

        ``on_layers(done, total)`` is called after each measured layer, ``keep`` with all costs after
        each block.
        """
        found = dict(known)
        for name in self.options:
            if name not in found and name not in self.seen:
                found[name] = self.cost(name, {})
        with self.passes.kept():
            for k in (None, *range(len(self.blocks))):
                todo = [name for name in self.layers_in(k) if name not in found]
                for group in turns(todo, self.need, self.limits.memory):
                    gathered = self.retried(k, group)
                    for name in group:
                        found[name] = self.layer(name, k, *(each.pop(name) for each in gathered))
                        on_layers(sum(n in found for n in self.seen), len(self.seen))
                if todo:
                    keep(found)
                if k is not None and k + 1 < len(self.blocks):
                    self.passes.retried(k, partial(self.passes.hand_on, k, self.handed))
        return {name: found[name] for name in self.options}

    def layer(self, name: str, k: int | None, sums: Gathering, sample: torch.Tensor) -> LayerCost:
        """The cost of a layer of block ``k``."""
        while True:
            try:
                errors, smallest = self.errors(name, sums, sample, k)
                break
            except self.limits.out_of_memory:
                self.need[name] = finer(self.need[name], name)
            self.passes.relieve()
            sums, sample = (each[name] for each in self.retried(k, [name]))
        change = self.passes.retried(k or 0, partial(self.change, k or 0, {name: smallest}))
        least = errors[self.options[name][0]]
        scale = change / least if least > 0 else 0.0
        return self.cost(name, {form: error * scale for form, error in errors.items()})

    def handed(self, part: slice) -> None:
        self.limits.check()
        self.evaluations += (part.stop - part.start) / len(self.blocks)

    def cost(self, name: str, errors: Mapping[str, float]) -> LayerCost:
        """``errors`` by format; 0 where they are not known to matter."""
        rows, *rest = self.shapes[name]
        options = tuple(
            Option(form, get(form).packed_bytes(self.shapes[name]), errors.get(form, 0.0))
            for form in self.options[name]
        )
        return LayerCost(name, rows * rest[0], options)

    def retried(self, k: int | None, names: Sequence[str]):
        return self.passes.retried(k or 0, lambda: self.gathered(k, names))

    def gathered(self, k: int | None, names: Sequence[str]):
        """Moments of layers' inputs, and some of the inputs [rows, in]."""
        sums = {name: Gathering(self.need[name].cuts) for name in names}
        samples: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        parts = self.passes.parts
        most = max(1, SAMPLE_ROWS // len(parts))
        for part in parts:
            with ExitStack() as stack:
                for name in names:

                    def watch(module, arguments, name=name):
                        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
                        sums[name].add(rows, None)
                        samples[name].append(rows[:: max(1, len(rows) // most)].clone())

                    layer = self.model.get_submodule(name)
                    stack.callback(layer.register_forward_pre_hook(watch).remove)
                if k is None:
                    self.passes.output(0, part, FP, {})
                else:
                    block = self.blocks[k].module
                    stack.callback(block.register_forward_hook(_enough).remove)
                    self.passes.to_block(k, part, FP, {})
            self.limits.check()
            share = 1 if k is None else 1 / len(self.blocks)
            self.evaluations += (part.stop - part.start) * share
        return sums, {name: torch.cat(rows) for name, rows in samples.items()}

    def errors(self, name: str, sums: Gathering, x: torch.Tensor, k: int | None):
        """Squared error of the layer's own output by format, and the layer in the smallest."""
        weight, bias = self.parameters_of(name)
        parts = sums.parts()
        goal = nn.functional.linear(
            x.float(), weight.float(), None if bias is None else bias.float()
        )
        found: dict[str, float] = {}
        smallest: Calibrated | None = None
        for form in self.options[name]:
            if k is None:  # as the walk does
                made = plain(get(form), weight, bias, "")
            else:
                grid = grid_of(form, self.weight_only[name])
                made = calibrate_layer(
                    grid, weight, bias, parts, self.settings, check=self.limits.check
                )
            shift = None if made.bias is None else made.bias.float()
            values = get(form).linear(x.float(), made.packed, shift, self.weight_only[name])
            found[form] = float((values - goal).square().sum(dtype=torch.float64))
            smallest = smallest or made
        return found, smallest

    def change(self, k: int, layers: Mapping[str, Calibrated]) -> float:
        """Squared change of the model's output with ``layers`` quantized, over the output's own."""
        wrong = whole = 0.0
        for part in self.passes.parts:
            now, before = self.output(k, part, layers), self.unchanged(part)
            for one, other in zip(now, before, strict=True):
                wrong += float((one - other).square().sum(dtype=torch.float64))
                whole += float(other.square().sum(dtype=torch.float64))
            self.limits.check()
        if not whole > 0:
            raise RoundingError("the model's output is zero on all states: no layer can be weighed")
        return wrong / whole

    def unchanged(self, part: slice) -> list[torch.Tensor]:
        key = (part.start, part.stop)
        if key not in self.reference:
            self.reference[key] = self.output(0, part, {})
        return self.reference[key]

    def output(self, k: int, part: slice, layers: Mapping[str, Calibrated]) -> list[torch.Tensor]:
        given = tensors_of(self.passes.output(k, part, FP, layers))
        self.evaluations += (part.stop - part.start) * (len(self.blocks) - k) / len(self.blocks)
        return [tensor.detach().to("cpu", torch.float32) for tensor in given]


def _enough(module, arguments, output) -> None:
    raise Enough
