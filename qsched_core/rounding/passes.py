"""Passes through a model of which some blocks are finished, in batches that fit into memory."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..formats.policy import Choice
from .blocks import Block, Enough, forward_of
from .errors import RoundingError
from .layer import Calibrated
from .layers import packed_layer
from .pace import Progress
from .plan import stored_bytes
from .solve import Check, nothing
from .streams import Streams

logger = logging.getLogger(__name__)

FP, Q = "fp", "q"  # streams: the unquantized model, and the one with finished layers quantized

ONE_STATE = "one state at a time; free some, or take smaller pictures to calibrate"

T = TypeVar("T")


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


@dataclass(frozen=True)
class Limits:
    """What a walk may take, and how it is watched and stopped.

    ``scratch`` is a folder for the states (None: the system's for temporary files), ``memory`` the
    bytes of the device for one stage's moments and their rounding (None: no limit).
    ``out_of_memory`` are the errors that say that memory is out.
    ``check`` is called at least once a batch, and for every block of 128 columns of a layer; what it
    raises ends the walk.  ``tell`` gets what should be known of the result, in a line;
    ``on_progress`` how far it is.
    """

    scratch: Path | None = None
    memory: int | None = None
    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError,)
    check: Check = nothing
    tell: Callable[[str], None] = logger.warning
    on_progress: Callable[[Progress], None] = field(default=lambda progress: None)

    def __post_init__(self):
        if self.memory is not None and self.memory <= 0:
            raise RoundingError(f"memory={self.memory} must be a positive number of bytes")


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
            module = model.get_submodule(name)
            placed = layer if device is None else layer.to(device)
            form = packed_layer(module, placed, chosen[name])
            stack.enter_context(forward_of(module, form.forward))
        yield


class Passes:
    """Runs ``model`` on ``states`` up to some block, those before it handing on what they gave.

    ``streams`` are kept apart: in Q the layers in ``done``, which grows outside of here, compute with
    what they were rounded to.  The batch is halved when memory is out, as ``limits`` say.
    """

    def __init__(
        self,
        model: nn.Module,
        states: States,
        blocks: Sequence[Block],
        chosen: Mapping[str, Choice],
        done: Mapping[str, Calibrated],
        streams: Sequence[str],
        limits: Limits,
    ):
        self.model, self.states, self.blocks, self.chosen = model, states, blocks, chosen
        self.done, self.streams, self.limits = done, streams, limits
        self.batch = states.batch
        inside = {name for block in blocks for name in self.layers_in(block)}
        self.outside = [name for name in chosen if name not in inside]

    def layers_in(self, block: Block) -> list[str]:
        return [name for name in self.chosen if f"{name}.".startswith(f"{block.name}.")]

    @property
    def parts(self) -> list[slice]:
        return self.states.parts(self.batch)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, outputs of blocks can be kept, in the limits' scratch folder."""
        folder = self.limits.scratch or Path(tempfile.gettempdir())
        room = stored_bytes(self.blocks, len(self.states), len(self.streams))
        with Streams(folder, room) as self.outputs:
            yield

    def retried(self, k: int, work: Callable[[], T]) -> T:
        """What ``work`` gives; each time that memory is out it begins anew, in batches half as large.

        What blocks before ``k`` gave is then made again, since no tensor says how to be halved.
        """
        stale = False
        while True:
            try:
                if stale:
                    self._rebuild(k)
                return work()
            except self.limits.out_of_memory as error:
                if self.batch == 1:
                    raise RoundingError(
                        f"block {self.blocks[k].name} does not fit into memory with {ONE_STATE}"
                    ) from error
            self.batch, stale = (self.batch + 1) // 2, True
            self.relieve()
            self.limits.tell(
                f"out of memory at block {self.blocks[k].name}: it goes on with batches of "
                f"{self.batch} states"
            )

    def relieve(self) -> None:
        """Give back what torch holds of the device and does not use."""
        if self.states.device.type == "cuda":
            torch.cuda.empty_cache()

    def to_block(self, k: int, part: slice, stream: str, layers: Mapping[str, Calibrated]) -> None:
        """One pass, which a hook ends in block ``k``; ``layers`` in blocks are quantized.

        Blocks before ``k`` hand on what they gave.
        """
        with self._handing_on(k, part, stream):
            self._run(k, part, stream, layers)

    def output(self, k: int, part: slice, stream: str, layers: Mapping[str, Calibrated]) -> Any:
        """What the model gives, with ``layers`` quantized and blocks before ``k`` as they were."""
        with self._handing_on(k, part, stream), self._quantized(stream, layers):
            return self.states.run(part)

    def hand_on(self, k: int, after: Callable[[slice], None]) -> None:
        """Keep the outputs of block ``k``, and let go of those that no later block needs.

        ``after`` is called for each part.
        """
        names = self.layers_in(self.blocks[k])
        for part in self.parts:
            for stream in self.streams:
                layers = {name: self.done[name] for name in names} if stream == Q else {}

                def keep(module, arguments, output, key=(stream, k, part.start)):
                    self.outputs.put(key, output)
                    raise Enough

                hook = self.blocks[k].module.register_forward_hook(keep)
                try:
                    self.to_block(k, part, stream, layers)
                finally:
                    hook.remove()
                for j, old in enumerate(self.blocks[:k]):
                    if old.last_use <= k:
                        self.outputs.hollow((stream, j, part.start))
            after(part)

    def _rebuild(self, k: int) -> None:
        """What the blocks before ``k`` gave, from the start, in the parts as they are now."""
        self.outputs.clear()
        before = self.blocks[:k]
        names = [name for block in before for name in self.layers_in(block)]
        for part in self.parts if before else ():
            for stream in self.streams:
                with ExitStack() as stack:
                    for j, block in enumerate(before):

                        def keep(module, arguments, output, j=j, key=(stream, j, part.start)):
                            needed = j + 1 == k or self.blocks[j].last_use >= k
                            (self.outputs.put if needed else self.outputs.hollow)(key, output)
                            if j + 1 == k:
                                raise Enough

                        stack.callback(block.module.register_forward_hook(keep).remove)
                    layers = {name: self.done[name] for name in names} if stream == Q else {}
                    self._run(k - 1, part, stream, layers)
            self.limits.check()

    @contextmanager
    def _handing_on(self, k: int, part: slice, stream: str) -> Iterator[None]:
        with ExitStack() as stack:
            for j, block in enumerate(self.blocks[:k]):

                def given(*arguments, key=(stream, j, part.start), **named):
                    return self.outputs.get(key, self.states.device)

                stack.enter_context(forward_of(block.module, given))
            yield

    def _quantized(self, stream: str, layers: Mapping[str, Calibrated]):
        layers = dict(layers)
        if stream == Q:
            layers |= {name: self.done[name] for name in self.outside}
        return quantized(self.model, layers, self.chosen, self.states.device)

    def _run(self, k: int, part: slice, stream: str, layers: Mapping[str, Calibrated]) -> None:
        with self._quantized(stream, layers):
            try:
                self.states.run(part)
            except Enough:
                return
        raise RoundingError(f"block {self.blocks[k].name} ran on the first state but not on others")
