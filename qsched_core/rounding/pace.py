"""How far a walk is, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

QUIET_SECONDS = 0.5  # between two reports


@dataclass(frozen=True)
class Progress:
    """``done`` (0 to 1) of block ``index`` of ``total``, and the seconds that all the rest takes."""

    index: int
    total: int
    name: str
    done: float
    seconds_left: float


class Pace:
    """Compares the work that is done with what was expected; ``works`` are of the blocks, in order.

    Their unit is of no matter.  A block's expectation may be corrected when it is begun.
    """

    def __init__(
        self, names: Sequence[str], works: Sequence[float], tell: Callable[[Progress], None]
    ):
        self._names, self._works, self._tell = names, list(works), tell
        self._began = self._told = time.monotonic()
        self._finished = self._spent = 0.0  # work, and the seconds that it took
        self._block, self._done = 0, 0.0

    def begin(self, block: int, work: float) -> None:
        """Block ``block`` is next, of so much work; that of those after it changes likewise."""
        share = work / self._works[block] if self._works[block] else 1.0
        self._works[block:] = [w * share for w in self._works[block:]]
        self._block, self._done, self._began = block, 0.0, time.monotonic()

    def step(self, work: float) -> None:
        self._done += work
        now = time.monotonic()
        if now - self._told >= QUIET_SECONDS:
            self._told = now
            whole = self._works[self._block]
            done = min(0.99, self._done / whole) if whole else 0.0
            self._tell(
                Progress(
                    self._block,
                    len(self._names),
                    self._names[self._block],
                    done,
                    self._left(now, done),
                )
            )

    def end(self, resumed: bool) -> float:
        """The block is finished, or was found so (``resumed``); the seconds that the others take."""
        if not resumed:
            self._finished += self._works[self._block]
            self._spent += time.monotonic() - self._began
        return self._rest() * self._spent / self._finished if self._finished else 0.0

    def _rest(self) -> float:
        return sum(self._works[self._block + 1 :])

    def _left(self, now: float, done: float) -> float:
        whole = self._works[self._block]
        work, spent = self._finished + done * whole, self._spent + now - self._began
        return ((1 - done) * whole + self._rest()) * spent / max(work, 1e-9 * whole)
