"""Prompt sets: those of the search, and the held-out ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .errors import plainly_named
from .text import shown

BUNDLED = Path(__file__).parent / "data" / "prompts.json"
MAX_SEED = 2**64 - 1
MAX_TEXT = 2**24  # characters; longer texts are refused


@plainly_named
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
                raise PromptError(f"prompts[{position}]={shown(prompt)} must be text")
        _check_letters(self.prompts)
        for position, seed in enumerate(self.seeds):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
                raise PromptError(
                    f"seeds[{position}]={shown(seed)} must be a whole number, 0 to 2^64 - 1"
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

    def at(self, places: Sequence[int]) -> PromptSet:
        """The prompts at ``places`` with their seeds, in that order."""
        return PromptSet(
            tuple(self.prompts[i] for i in places), tuple(self.seeds[i] for i in places)
        )


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
        check_apart(calibration, heldout)
        return cls(
            PromptSet(tuple(calibration), _seeds(seed, len(calibration), 0)),
            PromptSet(tuple(heldout), _seeds(seed, len(heldout), 1)),
        )


def check_apart(calibration: Sequence[str], heldout: Sequence[str]) -> None:
    """PromptError for an empty list, or for a prompt that is in both."""
    for name, prompts in (("calibration", calibration), ("held-out", heldout)):
        if not prompts:
            raise PromptError(f"the {name} prompts are empty; give one prompt a line")
        _check_letters(prompts)
    known = set(calibration)
    both = next((prompt for prompt in heldout if prompt in known), None)
    if both is not None:
        raise PromptError(
            f"held-out prompt {shown(both)} is a calibration prompt too; remove it from one list"
        )


def _check_letters(prompts: Sequence[str]) -> None:
    """PromptError for half of a surrogate pair, which no tokenizer takes."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise PromptError(
                f"the prompt {shown(prompt)} has half of a letter (an unpaired surrogate); remove it"
            ) from None


def _seeds(seed: int, count: int, role: int) -> tuple[int, ...]:
    # A stochastic solver draws from seed + 1: seeds four apart keep those streams separate too.
    draw = random.Random(f"{seed}/{role}")
    values: dict[int, None] = {}
    while len(values) < count:
        values[draw.randrange(2**46) * 4 + 2 * role] = None
    return tuple(values)


def parse_prompts(text: str, name: str = "prompts", distinct: bool = True) -> tuple[str, ...]:
    """One prompt a line, or a JSON list of them; blank ones and those that start with # are left out.

    Raises PromptError, naming ``name``, when nothing is left or, if they have to be ``distinct``,
    when a line is there twice; and for a text of more than 16 million characters.
    """
    if len(text) > MAX_TEXT:
        raise PromptError(f"{name} has {len(text)} characters; at most {MAX_TEXT} are read")
    lines = [line.strip() for line in _listed(text) or text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise PromptError(f"{name} has no prompts; write one a line (lines with # are comments)")
    _check_letters(prompts)
    seen: set[str] = set()
    for prompt in prompts:
        if distinct and prompt in seen:
            raise PromptError(f"{name} has {shown(prompt)} twice; remove one of the lines")
        seen.add(prompt)
    return prompts


def _listed(text: str) -> list[str] | None:
    """The prompts of a JSON list of strings, None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if found and all(isinstance(prompt, str) for prompt in found) else None


HELDOUT_LINE = "[heldout]"


def read_prompts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Calibration and held-out prompts of a file; PromptError names it and what is wrong.

    JSON is {"calibration": [...], "heldout": [...]}; in text, one prompt a line, the held-out ones
    follow a line ``[heldout]``.
    """
    try:
        size = path.stat().st_size
        if size > 4 * MAX_TEXT:
            raise PromptError(f"{path.name} has {size} bytes; at most {4 * MAX_TEXT} are read")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path.name} is not text in UTF-8 ({error})") from None
    except OSError as error:
        raise PromptError(f"{path.name} can't be read: {error.strerror}") from None
    if path.suffix.lower() == ".json":
        return _parts_of_json(text, path.name)
    lines = [line.strip() for line in text.splitlines()]
    if HELDOUT_LINE not in lines:
        raise PromptError(
            f"{path.name} has no line {HELDOUT_LINE}; write it between the calibration prompts and "
            "the held-out ones"
        )
    border = lines.index(HELDOUT_LINE)
    return (
        parse_prompts("\n".join(lines[:border]), f"{path.name}, calibration"),
        parse_prompts("\n".join(lines[border + 1 :]), f"{path.name}, held-out"),
    )


def _parts_of_json(text: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        content = json.loads(text)
        parts = [content[part] for part in ("calibration", "heldout")]
        for part in parts:
            if not isinstance(part, list) or not all(isinstance(p, str) for p in part):
                raise TypeError("its lists must hold text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PromptError(
            f'{name} must be JSON {{"calibration": [...], "heldout": [...]}} ({error})'
        ) from None
    return tuple(parts[0]), tuple(parts[1])


def categories() -> tuple[str, ...]:
    """What the bundled prompts are sorted by."""
    return tuple(json.loads(BUNDLED.read_text(encoding="utf-8")))


def bundled_prompts(seed: int = 0, chosen: Sequence[str] = ()) -> CalibrationPrompts:
    """The general set written for this project: 20 calibration and 64 held-out prompts.

    Of the ``chosen`` categories, or of all where none is.  PromptError for an unknown one.
    """
    return CalibrationPrompts.of(*bundled_lists(chosen), seed)


def bundled_lists(chosen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Calibration and held-out prompts of :func:`bundled_prompts`."""
    content = json.loads(BUNDLED.read_text(encoding="utf-8"))
    unknown = next((name for name in chosen if name not in content), None)
    if unknown is not None:
        raise PromptError(
            f"categories has {shown(unknown)}, which is not one; choose from {', '.join(content)}"
        )
    calibration, heldout = (
        [
            prompt
            for name, category in content.items()
            if not chosen or name in chosen
            for prompt in category[part]
        ]
        for part in ("calibration", "heldout")
    )
    return calibration, heldout
