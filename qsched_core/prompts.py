"""Prompt sets: what the search sees, and what it never sees."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

BUNDLED = Path(__file__).parent / "data" / "prompts.json"
MAX_SEED = 2**64 - 1


class PromptError(ValueError):
    """Prompts that can not be used; the message says how to mend them."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each with the seed of its initial noise.

    Raises PromptError when empty, when lengths differ, or when a seed is not in 0 .. 2**64 - 1.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        for name in ("prompts", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.prompts:
            raise PromptError("prompts is empty; give at least one")
        if len(self.prompts) != len(self.seeds):
            raise PromptError(
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds; give one seed a prompt"
            )
        for position, prompt in enumerate(self.prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise PromptError(f"prompts[{position}]={prompt!r} must be text")
        for position, seed in enumerate(self.seeds):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
                raise PromptError(
                    f"seeds[{position}]={seed!r} must be a whole number, 0 to 2^64 - 1"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of prompts and seeds in their order."""
        content = json.dumps([self.prompts, self.seeds], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def part(self, start: int, stop: int) -> PromptSet:
        """The prompts start .. stop - 1 with their seeds."""
        return PromptSet(self.prompts[start:stop], self.seeds[start:stop])


@dataclass(frozen=True)
class CalibrationPrompts:
    """Prompts to search on and prompts to judge by; PromptError if a (prompt, seed) is in both."""

    calibration: PromptSet
    heldout: PromptSet

    def __post_init__(self):
        shared = set(self.calibration.seeds) & set(self.heldout.seeds)
        if shared:
            raise PromptError(
                f"seed {min(shared)} is in the calibration and in the held-out set; "
                "held-out images must start from noise that the search never saw"
            )

    @classmethod
    def of(
        cls, calibration: Sequence[str], heldout: Sequence[str], seed: int = 0
    ) -> CalibrationPrompts:
        """Give every prompt a seed of its own, derived from ``seed``.

        Seeds are distinct within and between the two sets, and adding prompts at the end of either
        leaves the others' seeds as they were.  PromptError for an empty list, or for a prompt that
        is in both.
        """
        for name, prompts in (("calibration", calibration), ("held-out", heldout)):
            if not prompts:
                raise PromptError(f"the {name} prompts are empty; give one prompt a line")
        both = [prompt for prompt in heldout if prompt in set(calibration)]
        if both:
            raise PromptError(
                f"held-out prompt {both[0]!r} is a calibration prompt too; remove it from one list"
            )
        return cls(
            PromptSet(tuple(calibration), _seeds(seed, len(calibration), 0)),
            PromptSet(tuple(heldout), _seeds(seed, len(heldout), 1)),
        )


def _seeds(seed: int, count: int, role: int) -> tuple[int, ...]:
    # A stochastic solver draws from seed + 1: seeds four apart keep those streams separate too.
    draw = random.Random(f"{seed}/{role}")
    values: dict[int, None] = {}
    while len(values) < count:
        values[draw.randrange(2**46) * 4 + 2 * role] = None
    return tuple(values)


def parse_prompts(text: str, name: str = "prompts", distinct: bool = True) -> tuple[str, ...]:
    """One prompt a line; blank lines and lines that start with # are left out.

    Raises PromptError, naming ``name``, when nothing is left or, if they have to be ``distinct``,
    when a line is there twice.
    """
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise PromptError(f"{name} has no prompts; write one a line (lines with # are comments)")
    seen: set[str] = set()
    for prompt in prompts:
        if distinct and prompt in seen:
            raise PromptError(f"{name} has {prompt!r} twice; remove one of the lines")
        seen.add(prompt)
    return prompts


def bundled_prompts(seed: int = 0) -> CalibrationPrompts:
    """The general set written for this project: 20 calibration and 64 held-out prompts."""
    categories = json.loads(BUNDLED.read_text(encoding="utf-8"))
    calibration, heldout = (
        [prompt for category in categories.values() for prompt in category[part]]
        for part in ("calibration", "heldout")
    )
    return CalibrationPrompts.of(calibration, heldout, seed)
