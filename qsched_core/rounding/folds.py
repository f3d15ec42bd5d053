"""Where a mean can be taken off a layer's inputs at no cost: an earlier bias takes it off.

Inputs that are rounded to few bits are rounded less coarsely around zero.  A constant can be taken
off them wherever earlier layers just add one: the shift of a modulation (producer.bias -= mean on a
slice), or the values of an attention, whose weights sum to one.  The layer's own bias gives it back
(consumer.bias += W mean), so that in full precision nothing changes.  Which layers these are is found
out in the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import nn

from .blocks import tensors_of
from .layer import Calibrated

ROWS = 64  # of a layer's inputs that are looked at to find candidates
STRENGTH = 4.0  # of the constant that is added to find out, over the inputs' root mean square
SAMPLES = 65536  # values of a tensor that are compared

Slice = tuple[str, int]  # a layer, and the first of its outputs


@dataclass(frozen=True)
class Fold:
    """A constant added to ``width`` outputs of each producer is added to all inputs of each consumer.

    It does nothing else to the block.
    """

    producers: tuple[Slice, ...]
    consumers: tuple[str, ...]
    width: int

    def taken_off(
        self, layers: Mapping[str, Calibrated], mean: torch.Tensor
    ) -> dict[str, Calibrated]:
        """The producers with ``mean`` [width] taken off what they add to the consumers' inputs."""
        changed = {}
        for name, start in self.producers:
            layer = changed.get(name, layers[name])
            bias = layer.bias.clone()
            bias[start : start + self.width] -= mean.to(bias)
            changed[name] = replace(layer, bias=bias)
        return changed


def folds_of(
    layers: Mapping[str, nn.Module],
    stages: Sequence[Mapping[str, int]],
    wanted: Iterable[str],
    block: nn.Module,
    run: Callable[[], None],
) -> list[Fold]:
    """The folds for the layers ``wanted``, of those (``layers``) whose biases may be changed.

    ``stages`` as from :func:`.blocks.stages_of`, of those layers of ``block``; ``run`` runs the
    block once, always on the same inputs.  One producer of a consumer's whole input is looked for,
    then two whose effects add up, as those of the two streams of a joint attention.
    """
    stage = {name: k for k, names in enumerate(stages) for name in names if names[name] == 1}
    able = [n for n in stage if isinstance(layers.get(n), nn.Linear) and layers[n].bias is not None]
    wanted = [n for n in wanted if n in able and stage[n] > 0]
    found: list[Fold] = []
    for width in sorted({layers[n].in_features for n in wanted}):
        rows = {n for n in wanted if layers[n].in_features == width}
        last = max(stage[n] for n in rows)
        slices = [
            (n, start)
            for n in able
            if stage[n] < last and not layers[n].out_features % width
            for start in range(0, layers[n].out_features, width)
        ]
        probe = _Probe(layers, stage, block, run, width)
        moved = {part: probe.moved(part, rows) for part in slices}
        singles = [(part,) for part in slices if moved[part]]
        pairs = [(a, b) for (a,), (b,) in combinations(singles, 2) if a[0] != b[0]]
        for parts in singles + pairs:
            taken = {n for fold in found for n in fold.consumers}
            reached = set.intersection(*(set(moved[part]) for part in parts)) - taken
            if not any(probe.is_constant(sum(moved[p][n] for p in parts)) for n in reached):
                continue
            fold = probe.confirmed(parts)
            if fold and set(fold.consumers) <= set(able) - taken:
                found.append(fold)
    return found


class _Probe:
    """Adds one constant to outputs of layers and looks at what else of the block changes."""

    def __init__(self, layers, stage: Mapping[str, int], block, run, width: int):
        self.layers, self.stage, self.block, self.run_block = layers, stage, block, run
        self.width = width
        self.base = self.inputs((), [n for n in stage if self.reads(n)])
        sample = next(iter(self.base.values()))
        size = max(float(x.float().square().mean()) for x in self.base.values()) ** 0.5
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(width, generator=random) * STRENGTH * (size or 1.0)
        # In the inputs' own precision, so that only adding it is rounded.
        self.constant = noise.to(sample).float()
        self.tolerance = max(2 * torch.finfo(sample.dtype).eps, 1e-5)

    def reads(self, name: str) -> bool:
        return getattr(self.layers[name], "in_features", None) == self.width

    def is_constant(self, change: torch.Tensor) -> bool:
        """Whether change [..., width] is the constant everywhere, but for rounding."""
        wrong = (change - self.constant).square().mean().sqrt()
        return bool(wrong <= self.tolerance * self.constant.square().mean().sqrt())

    def moved(self, part: Slice, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """How inputs of layers change [rows, width], where they do, with the constant at ``part``."""
        now = self.inputs([part], names)
        changes = {n: now[n].float() - self.base[n].float() for n in names}
        return {n: change for n, change in changes.items() if change.any()}

    def inputs(self, parts: Sequence[Slice], names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some rows [rows, width] of the inputs of layers."""
        seen: dict[str, torch.Tensor] = {}

        def look(name: str, x: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            seen[name] = rows[:: max(1, len(rows) // ROWS)].clone()

        self.run(parts, dict.fromkeys(names, look))
        return seen

    def confirmed(self, parts: Sequence[Slice]) -> Fold | None:
        """The fold of ``parts``, if the constant reaches whole inputs of layers and nothing else."""
        before: dict[str, torch.Tensor] = {}
        marks: dict[str, list] = {}
        after: dict[str, list] = {}
        moved: list[str] = []

        def keep(name, x):
            marks[name] = _marks(x)
            if self.reads(name):
                # Both runs go on with this one: a copy's strides can give a product other roundings.
                before[name] = x.clone()
            return before.get(name)

        def undo(name, x):
            other = before.get(name)
            if other is None or torch.equal(x, other):
                after[name] = _marks(x)
            elif self.is_constant(x.float() - other.float()):
                moved.append(name)
            else:
                return None
            return other

        first = self.run((), dict.fromkeys(self.stage, keep))
        second = self.run(parts, dict.fromkeys(self.stage, undo))
        others = [n for n in self.stage if n not in moved]
        if not moved or not _alike(first, second):
            return None
        if any(n not in after or not _alike(marks[n], after[n]) for n in others):
            return None
        return Fold(tuple(parts), tuple(moved), self.width)

    def run(self, parts: Sequence[Slice], watched) -> list[torch.Tensor]:
        """One run with the constant added to ``parts``; marks of the block's output.

        ``watched`` (name: function of name and inputs) may give other inputs to go on with.
        """
        given: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for name, start in parts:

                def add(module, arguments, output, start=start):
                    output = output.clone()
                    output[..., start : start + self.width] += self.constant.to(output)
                    return output

                hooks.callback(self.layers[name].register_forward_hook(add).remove)
            for name, look in watched.items():

                def watch(module, arguments, name=name, look=look):
                    other = look(name, arguments[0])
                    return None if other is None else (other, *arguments[1:])

                hooks.callback(self.layers[name].register_forward_pre_hook(watch).remove)

            def done(module, arguments, output):
                given.extend(m for t in tensors_of(output) for m in _marks(t))

            hooks.callback(self.block.register_forward_hook(done).remove)
            self.run_block()
        return given


def _marks(x: torch.Tensor) -> list[torch.Tensor]:
    """What tells a tensor from another one: some of its values, and the sum of all."""
    flat = x.detach().reshape(-1)
    return [flat[:: max(1, flat.numel() // SAMPLES)].clone(), flat.sum(dtype=torch.float64)]


def _alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
