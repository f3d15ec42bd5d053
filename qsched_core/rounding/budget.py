"""A size for a model: which layer gets how many bits, by what each format of it costs the output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..files import size_text
from .errors import RoundingError
from .grid import Grid
from .grids import grid_of

LADDER = ("int2", "int3", "nf4", "int8")


@dataclass(frozen=True)
class Budget:
    """A target, either in ``bits`` a weight over the quantized layers or in ``gb`` (1e9 bytes) of
    the whole model, and the formats (``ladder``) that its layers may get.

    Costs are measured on the first ``prompts`` calibration prompts.  RoundingError for anything but
    one positive target, and for a ladder of fewer than two formats that can be compared.
    """

    bits: float | None = None
    gb: float | None = None
    ladder: tuple[str, ...] = LADDER
    prompts: int = 8

    def __post_init__(self):
        if (self.bits is None) == (self.gb is None):
            raise RoundingError(f"give bits or gb, one of them: bits={self.bits}, gb={self.gb}")
        name, value = ("gb", self.gb) if self.bits is None else ("bits", self.bits)
        if not 0 < value < math.inf:
            raise RoundingError(f"{name}={value} must be a positive number")
        if len(set(self.ladder)) < 2 or len(set(self.ladder)) < len(self.ladder):
            raise RoundingError(f"ladder={self.ladder} must have two formats and more, each once")
        if self.prompts < 1:
            raise RoundingError(f"prompts={self.prompts} must be 1 or more")
        for form in self.ladder:
            grid = grid_of(form)
            if grid.coarse or type(grid).turned is not Grid.turned:
                raise RoundingError(
                    f"ladder: {form} looks at its inputs in a way of its own and can't be weighed "
                    "against others; leave it out"
                )

    def room(self, costs: Sequence[LayerCost], rest: int) -> int:
        """Bytes that the quantized layers may take beside ``rest`` bytes of the model."""
        if self.bits is not None:
            return math.floor(self.bits * sum(cost.weights for cost in costs) / 8)
        return math.floor(self.gb * 1e9) - rest

    def __str__(self) -> str:
        return f"{self.gb:g} GB" if self.bits is None else f"{self.bits:g} bits a weight"


@dataclass(frozen=True)
class Option:
    """A format of a layer, its bytes, and what it alone costs.

    ``error`` is the squared change of the model's output over the output's own square.
    """

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class LayerCost:
    """A layer of so many ``weights``, and its options."""

    name: str
    weights: int
    options: tuple[Option, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> LayerCost:
        options = tuple(
            Option(str(o["format"]), int(o["nbytes"]), float(o["error"]))
            for o in content["options"]
        )
        return cls(str(content["name"]), int(content["weights"]), options)

    @property
    def smallest(self) -> Option:
        return min(self.options, key=lambda option: (option.nbytes, option.error))

    @property
    def hull(self) -> list[Option]:
        """From the smallest on, each the one that lowers the error most for a byte more."""
        found = [self.smallest]
        while True:
            now = found[-1]
            better = [o for o in self.options if o.nbytes > now.nbytes and o.error < now.error]
            if not better:
                return found
            found.append(max(better, key=lambda o: _worth(now, o)))

    def in_format(self, name: str) -> Option:
        """The option of format ``name``, else the smallest."""
        own = [option for option in self.options if option.format == name]
        return own[0] if own else self.smallest


def _worth(now: Option, then: Option) -> float:
    return (now.error - then.error) / (then.nbytes - now.nbytes)


@dataclass(frozen=True)
class Allocation:
    """Layers in the model's order, each with the option that it got."""

    costs: tuple[LayerCost, ...]
    chosen: tuple[Option, ...]

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for option in self.chosen)

    @property
    def bits(self) -> float:
        """Bits a weight, tables counted."""
        return 8 * self.nbytes / sum(cost.weights for cost in self.costs)

    @property
    def error(self) -> float:
        """What all choices cost together: errors of single layers add up."""
        return sum(option.error for option in self.chosen)

    @property
    def formats(self) -> dict[str, str]:
        pairs = zip(self.costs, self.chosen, strict=True)
        return {cost.name: option.format for cost, option in pairs}

    def rows(self) -> list[dict[str, Any]]:
        """Plain data of the choice: layer, format, bits, error, and the other formats' errors."""
        return [
            {
                "layer": cost.name,
                "format": option.format,
                "bits": 8 * option.nbytes / cost.weights,
                "error": option.error,
                "errors": {o.format: o.error for o in cost.options},
            }
            for cost, option in zip(self.costs, self.chosen, strict=True)
        ]


def allocate(costs: Sequence[LayerCost], room: int) -> Allocation:
    """The least sum of errors in ``room`` bytes.

    The layers' hulls are gone along by what a byte is worth, which is Lagrange's condition; a step
    that does not fit any more is left out, and so are those after it.  RoundingError, with what is
    the least, where not even the smallest formats fit.
    """
    now = [cost.smallest for cost in costs]
    left = room - sum(option.nbytes for option in now)
    if left < 0:
        weights = sum(cost.weights for cost in costs)
        least = room - left
        raise RoundingError(
            f"the quantized layers take {size_text(least)} ({8 * least / weights:.3f} bits a weight) "
            f"at least, and {size_text(max(0, room))} are left for them; give more, or a format with "
            "fewer bits"
        )
    steps = [
        (_worth(before, after), layer, before, after)
        for layer, cost in enumerate(costs)
        for before, after in zip(cost.hull, cost.hull[1:], strict=False)
    ]
    for _, layer, before, after in sorted(steps, key=lambda step: -step[0]):
        more = after.nbytes - before.nbytes
        if now[layer] is before and more <= left:
            now[layer], left = after, left - more
    return Allocation(tuple(costs), tuple(now))


def uniform(costs: Sequence[LayerCost], form: str) -> Allocation:
    """Every layer in one format, where it fits."""
    return Allocation(tuple(costs), tuple(cost.in_format(form) for cost in costs))
