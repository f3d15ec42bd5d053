"""What a walk takes, before it begins: rows of inputs, memory of moments, and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from ..files import size_text
from .blocks import Block
from .errors import RoundingError
from .layers import count_of
from .moments import FINE_WIDTH
from .solve import BLOCK

UNIT = 256  # columns: where matrices may be cut; every format's groups and rotations fit in
COPIES = 11  # of a weight in fp32 that rounding holds at a time, measured with what chunks take
FEWEST = 1 / 16  # rows an input feature; see check_rows


@dataclass(frozen=True)
class Seen:
    """What one state gives a layer: rows of inputs, over so many calls."""

    rows: int
    calls: int


def survey(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Seen]:
    """The layers that ``run`` (of one state) runs; RoundingError names one with NaN inputs."""
    found: dict[str, Seen] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def watch(module, arguments, name=name, layer=layer):
                x = arguments[0]
                if not torch.isfinite(x.sum(dtype=torch.float32)) and not torch.isfinite(x).all():
                    raise RoundingError(
                        f"layer {name}: its inputs are NaN or infinite on the first state; compute "
                        "the model in bf16 or fp32, or use a sound copy of it"
                    )
                old = found.get(name, Seen(0, 0))
                found[name] = Seen(old.rows + count_of(layer, x), old.calls + 1)

            hooks.callback(layer.register_forward_pre_hook(watch).remove)
        run()
    return found


def check_rows(seen: Mapping[str, Seen], widths: Mapping[str, int], states: int) -> str:
    """Whether ``states`` give each layer of ``widths`` input features rows enough.

    What is said of the worst layer, "" if nothing is.  A layer that gets one row a state (modulation)
    is left out: its inputs are few whatever is done.  On the demo model int2's error is .0063 at 9
    rows a feature, .013 at 2.8, .029 at 1.1 and .041 at .56, where plain rounding's is .060: below
    1, few rows cost most of the gain, and the line through these meets plain rounding near 1/4.
    RoundingError below 1/16, where no walk is worth its time.
    """
    shares = {
        name: seen[name].rows * states / width
        for name, width in widths.items()
        if name in seen and seen[name].rows > seen[name].calls
    }
    if not shares:
        return ""
    worst = min(shares, key=shares.get)
    if shares[worst] >= 1:
        return ""
    rows, width = seen[worst].rows, widths[worst]
    enough = math.ceil(width / rows)
    told = (
        f"{states} states give layer {worst} {rows * states} rows of inputs for its {width} "
        f"features; {enough} states and more tell it enough (prompts times steps of each)"
    )
    if shares[worst] < FEWEST:
        raise RoundingError(f"too few calibration prompts: {told}")
    return f"few calibration prompts: {told}"


@dataclass(frozen=True)
class Need:
    """Bytes of the device that a layer of weight [out, in] takes with its columns cut into ``blocks``.

    ``waiting``: its moments.  ``work``: these and what rounding adds at most.
    """

    rows: int
    columns: int
    blocks: int

    @property
    def width(self) -> int:
        """Columns of the widest block."""
        units = -(-self.columns // UNIT)
        return min(self.columns, -(-units // self.blocks) * UNIT)

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(range(self.width, self.columns, self.width))

    @property
    def _matrix(self) -> int:
        """One block's matrix."""
        return self.width**2 * (8 if self.width <= FINE_WIDTH else 4)

    @property
    def waiting(self) -> int:
        return 2 * (len(self.cuts) + 1) * self._matrix

    @property
    def work(self) -> int:
        weights = COPIES * 4 * self.rows * self.columns
        return max(self.waiting + self._matrix, self.waiting // 2 + 3 * self._matrix) + weights

    @property
    def flops(self) -> float:
        """Of rounding it, about: how long layers take beside each other."""
        return 2.0 * self.columns * self.width * (self.width + 10 * self.rows)


def _halved(need: Need) -> Need | None:
    """Cut into twice as many blocks, None where they can't be narrower."""
    made = Need(need.rows, need.columns, 2 * need.blocks)
    return None if made.width == need.width else made


def finer(need: Need, name: str) -> Need:
    """Layer ``name``, whose rounding was out of memory; RoundingError if it can't be cut further."""
    made = _halved(need)
    if made is None:
        raise RoundingError(
            f"layer {name} of {need.rows} x {need.columns} can't be rounded in the memory that is "
            "free; free some, or round on another device"
        )
    return made


def needs(shapes: Mapping[str, tuple[int, int]], memory: int | None) -> dict[str, Need]:
    """How each layer of weight (out, in) is cut to be rounded in ``memory`` bytes (None: no limit).

    RoundingError names a layer that takes more however it is cut.
    """
    made = {}
    for name, (rows, columns) in shapes.items():
        need: Need | None = Need(rows, columns, 1)
        while memory is not None and need.work > memory:
            least, need = need.work, _halved(need)
            if need is None:
                raise RoundingError(
                    f"layer {name} of {rows} x {columns} takes {size_text(least)} to be rounded, "
                    f"memory={memory} allows {size_text(memory)}; allow more"
                )
        made[name] = need
    return made


def turns(stage: Sequence[str], need: Mapping[str, Need], memory: int | None) -> list[list[str]]:
    """The layers of a stage in groups whose moments are in ``memory`` bytes together."""
    groups: list[list[str]] = []
    for name in stage:
        group = [*groups[-1], name] if groups else [name]
        waiting = sum(need[n].waiting for n in group)
        most = max(waiting - need[n].waiting + need[n].work for n in group)
        if groups and (memory is None or most <= memory):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def stored_bytes(blocks: Sequence[Block], states: int, streams: int) -> int:
    """What the outputs of blocks take on the disk at most, of all states and streams."""
    most = 0
    for k in range(len(blocks) - 1):
        held = [b.nbytes for j, b in enumerate(blocks[: k + 1]) if j == k or b.last_use >= k]
        most = max(most, sum(held))
    return most * states * streams


def calls_of(need: Need, rounds: int, sweeps: int) -> int:
    """How often rounding a layer calls ``check``, about."""
    return max(1, -(-need.columns // BLOCK) * (1 + rounds * sweeps))
