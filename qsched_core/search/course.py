"""How far a calibration is: one measure over all its parts, weighed by model evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

PRECHECK = "pre-check"
LEVELS = "noise levels by dynamic programming"
SEARCH = "search"
HELDOUT = "check on held-out prompts"
CONTROL = "control on the unquantized model"
PARTS = (PRECHECK, LEVELS, SEARCH, HELDOUT, CONTROL)
RECENT = 8
TRUSTED = 0.2  # share of a part after which its own speed is believed


@dataclass(frozen=True)
class Standing:
    """How far a calibration is.

    ``done`` of ``total`` units, over all parts: a picture is one unit a step, and one for being
    decoded and scored.  ``seconds_left`` is None until something was timed.  Of ``trials``
    ``finished`` are known, the first ``continued`` of them from an earlier run; ``best`` is the
    highest value so far.  ``loading``: no step was made yet.
    """

    part: str
    done: float
    total: float
    seconds_left: float | None
    finished: int
    trials: int
    best: float | None
    continued: int
    loading: bool

    @property
    def text(self) -> str:
        """One line for the user."""
        if self.part != SEARCH:
            said = self.part
        else:
            said = f"search: trial {min(self.finished + 1, self.trials)} of {self.trials}"
            if 0 < self.continued == self.finished < self.trials:
                said = f"continuing from trial {self.continued}, {said}"
            if self.loading:
                said = f"loading the models, {said}"
            if self.best is not None:
                said += f", best JAQ {self.best:.4f}"
        if self.seconds_left is not None:
            said += f", about {duration(self.seconds_left)} left"
        return said


def duration(seconds: float) -> str:
    """As minutes and seconds, "02:31", with hours in front where there are any."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Course:
    """Follows a calibration and says at every step how far it is.

    ``steps`` are those of a picture.  ``expect`` says how many pictures a part will make; what a
    part did not need counts as done when the next one begins.  ``done`` never falls.
    """

    def __init__(
        self,
        steps: int,
        tell: Callable[[Standing], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.each = steps + 1
        self.tell, self.clock = tell, clock
        self.part, self.loading = SEARCH, True
        self._size = dict.fromkeys(PARTS, 0.0)
        self._done = dict.fromkeys(PARTS, 0.0)
        self._base = self._tick = self._limit = 0.0  # of the pictures that are being made
        self._timed: tuple[float, float] | None = None  # since when, and what was done then
        self._trials: list[tuple[float, int]] = []  # seconds and pictures of each
        self.trials = self.continued = 0
        self.best: float | None = None

    def expect(self, part: str, pictures: int) -> None:
        self._size[part] = float(pictures * self.each)

    def begin(self, part: str) -> None:
        for earlier in PARTS[: PARTS.index(part)]:
            self._done[earlier] = self._size[earlier]
        self.part, self._timed = part, None
        self._say()

    def measuring(self, pictures: int, batches: int) -> None:
        """``pictures`` are made next, in so many batches."""
        if self._trials and not self.continued and self.loading:
            self.continued = len(self._trials)
        self._base = self._done[self.part]
        self._limit = self._base + pictures * self.each
        self._tick = pictures / max(1, batches)
        self._say()

    def step(self) -> None:
        """A step of a batch is done."""
        self.loading = False
        most = self._limit - (self._limit - self._base) / self.each  # scoring is to come
        self._reach(min(self._done[self.part] + self._tick, most))
        if self._timed is None:  # what came before it was loading too
            self._timed = (self.clock(), self._done[self.part])
        self._say()

    def scored(self) -> None:
        """The pictures are made and scored."""
        self.loading = False
        self._reach(self._limit)
        self._say()

    def trial(self, best: float, seconds: float, pictures: int, trials: int, prompts: int) -> None:
        """A trial is known, made here or not: of ``trials`` with ``prompts`` pictures each."""
        self.best, self.trials = best, trials
        self._trials.append((seconds, pictures))
        self.expect(SEARCH, trials * prompts)
        self._reach(len(self._trials) * prompts * self.each, SEARCH)
        self._say()

    def _reach(self, units: float, part: str | None = None) -> None:
        part = part or self.part
        self._done[part] = min(self._size[part], max(self._done[part], units))

    def _left(self) -> float | None:
        """Seconds: a trial by the last ones, whatever they shared; other parts by the picture."""
        recent = self._trials[-RECENT:]
        seconds, pictures = sum(each[0] for each in recent), sum(each[1] for each in recent)
        pace = None if recent and self.part == SEARCH else self._own_pace()
        if pace is None:
            if not pictures:
                return None
            pace = seconds / (pictures * self.each)
        left = {part: self._size[part] - self._done[part] for part in PARTS}
        trials = left.pop(SEARCH)
        if recent:
            share = trials / self._size[SEARCH]
            return share * self.trials * seconds / len(recent) + sum(left.values()) * pace
        return (trials + sum(left.values())) * pace

    def _own_pace(self) -> float | None:
        """Seconds a unit since the first step of this part; None while that says little."""
        if self._timed is None:
            return None
        since, before = self._timed
        made = self._done[self.part] - before
        wanted = self._size[self.part] - before
        if self.part == SEARCH:  # its first pictures, while no trial is known
            wanted = self._limit - self._base
        return (self.clock() - since) / made if made > TRUSTED * wanted else None

    def _say(self) -> None:
        if self.tell is None:
            return
        self.tell(
            Standing(
                self.part,
                sum(self._done.values()),
                sum(self._size.values()),
                self._left(),
                len(self._trials),
                self.trials,
                self.best,
                self.continued,
                self.loading,
            )
        )
