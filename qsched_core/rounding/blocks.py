"""A model's blocks: which there are, in what order they run, and what depends on what.

Everything is found by running the model's own forward on one state and looking at what its blocks
and layers are given, so no architecture is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from .errors import RoundingError

Run = Callable[[], None]  # runs the model's own forward


class Enough(BaseException):  # no Exception: a model's own handlers must not keep it
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` in place of its own; its weights and attributes stay to be read."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def map_tensors(tree: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """``tree`` of tuples, lists, dicts and dataclasses with every tensor (or ``kind``) changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, change, kind) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, change, kind) for item in tree)
    if isinstance(tree, dict):
        return {key: map_tensors(item, change, kind) for key, item in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = copy(tree)
        for part in fields(tree):
            value = map_tensors(getattr(tree, part.name), change, kind)
            object.__setattr__(changed, part.name, value)
        return changed
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(tree, found.append)
    return found


Mark = tuple[tuple[int, ...], float, float]


def _marks(tree: Any) -> list[Mark]:
    """Shape, sum and sum of squares of every tensor: enough to tell whether one was shaken."""
    marks = []
    for tensor in tensors_of(tree):
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        squares = flat.float().square().sum(dtype=torch.float64)
        marks.append((tuple(tensor.shape), float(flat.sum(dtype=torch.float64)), float(squares)))
    return marks


@dataclass(frozen=True)
class _OnHost:
    """A tree whose tensors were moved to host memory, and where they were."""

    tree: Any
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, tree: Any) -> _OnHost:
        devices = tuple(tensor.device for tensor in tensors_of(tree))
        return cls(map_tensors(tree, lambda t: t.detach().to("cpu", copy=True)), devices)

    def back(self) -> Any:
        devices = iter(self.devices)
        return map_tensors(self.tree, lambda t: t.to(next(devices), copy=True))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in tensors_of(self.tree))


def _shaken(tree: Any) -> Any:
    """``tree`` with other values in every tensor of floats, no multiple of the old ones."""
    random = torch.Generator().manual_seed(0)

    def shake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=random).to(tensor)
        return tensor + noise * tensor.abs().mean().clamp(min=1e-3)

    return map_tensors(tree, shake)


@dataclass(frozen=True)
class Block:
    """One block, its name in the model, and the last block that uses its output.

    ``last_use`` counts blocks in the order in which they run.  ``nbytes`` is what the block gives
    for one state.
    """

    name: str
    module: nn.Module
    last_use: int
    nbytes: int


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _candidates(model: nn.Module, ran: Collection[nn.Module]) -> dict[str, nn.Module]:
    """The outermost modules that run and are items of a list.

    A sequence whose items the model runs one by one, as a UNet's are, is such a list too.
    """
    found: dict[str, nn.Module] = {}

    def look(path: str, module: nn.Module, listed: bool) -> None:
        for key, child in module.named_children():
            name = f"{path}{key}"
            if listed and child in ran:
                found[name] = child
            else:
                is_list = isinstance(child, CONTAINERS) and child not in ran
                look(f"{name}.", child, listed or is_list)

    look("", model, False)
    return found


def _ran(model: nn.Module, run: Run) -> Counter[nn.Module]:
    """How often each module runs."""
    found: Counter[nn.Module] = Counter()
    with ExitStack() as hooks:
        for module in model.modules():

            def ran(module, arguments):
                found[module] += 1

            hooks.callback(module.register_forward_pre_hook(ran).remove)
        run()
    return found


def blocks_of(model: nn.Module, run: Run, layers: Collection[str] = ()) -> list[Block]:
    """The blocks of ``model`` in the order in which ``run`` runs them.

    Those of ``layers`` that lie in no block and run once are blocks of their own, as what all blocks
    of a model share.  RoundingError where there are none, or where one runs more than once.
    """
    ran_often = _ran(model, run)
    blocks = _candidates(model, ran_often)
    inside = tuple(f"{name}." for name in blocks)
    alone = {name: model.get_submodule(name) for name in layers if not name.startswith(inside)}
    blocks |= {name: layer for name, layer in alone.items() if ran_often[layer] == 1}
    names = {child: name for name, child in blocks.items()}
    order: list[nn.Module] = []
    outputs: dict[nn.Module, _OnHost] = {}

    def ran(module, arguments, output):
        if module in outputs:
            raise RoundingError(
                f"block {names[module]} runs more than once in one evaluation; such a model can't be "
                "calibrated block after block yet"
            )
        order.append(module)
        outputs[module] = _OnHost.of(output)

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_hook(ran).remove)
        run()
    if not order:
        raise RoundingError(
            "the model has no blocks: no item of a ModuleList ran; calibrated rounding goes through "
            "a model block after block"
        )
    uses = _last_uses(order, outputs, run)
    return [
        Block(names[module], module, uses[k], outputs[module].nbytes)
        for k, module in enumerate(order)
    ]


def _last_uses(order: list[nn.Module], outputs: Mapping[nn.Module, _OnHost], run: Run) -> list[int]:
    """The last block to which each block's output makes a difference; the very last where none shows.

    What reaches blocks inside of an object of the model's own does not show.
    """

    def given(shaken: int | None) -> list[list[Mark]]:
        seen: list[list[Mark]] = []

        def stub(k: int):
            def forward(*arguments, **named):
                seen.append(_marks((arguments, named)))
                output = outputs[order[k]].back()
                return _shaken(output) if k == shaken else output

            return forward

        with ExitStack() as stack:
            for k, module in enumerate(order):
                stack.enter_context(forward_of(module, stub(k)))
            run()
        return seen

    base = given(None)
    uses = []
    for k in range(len(order)):
        other = given(k)
        differ = [j for j in range(k + 1, len(order)) if base[j] != other[j]]
        uses.append(max(differ, default=len(order) - 1))
    return uses


def stages_of(layers: Mapping[str, nn.Module], run: Run) -> list[dict[str, int]]:
    """Layers (name: module) in stages: a layer's inputs depend on layers of earlier stages alone.

    Each stage has its layers with how often they run.  Those that ``run`` does not run are in none.  Layers of one stage can share a pass over the data.
    """

    def inputs(shaken: str | None) -> dict[str, list[Mark]]:
        seen: dict[str, list[Mark]] = {}
        with ExitStack() as hooks:
            for name, layer in layers.items():

                def watch(module, arguments, output, name=name):
                    seen.setdefault(name, []).extend(_marks(arguments[0]))
                    return _shaken(output) if name == shaken else output

                hooks.callback(layer.register_forward_hook(watch).remove)
            run()
        return seen

    base = inputs(None)
    stage: dict[str, int] = dict.fromkeys(base, 0)
    for name in base:  # in the order in which they run
        other = inputs(name)
        for later in base:
            if later != name and base[later] != other.get(later, []):
                stage[later] = max(stage[later], stage[name] + 1)
    count = max(stage.values(), default=-1) + 1
    return [{name: len(base[name]) for name in base if stage[name] == k} for k in range(count)]
