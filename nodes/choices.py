"""Inputs that are a word, or a number: "solver's own", or 0.3.

ComfyUI shows the words in a list, and a field for the number once that is chosen.  A graph of
version 0.1.0 has a plain number in that place, and one number there stood for the word.  Such
graphs are taken as they are, so a script may give a plain number too: ComfyUI hands an input that
it can't place to the node (``accept_all_inputs``), and the node reads it here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from comfy_api.latest import io

from ..qsched_core.text import shown

NUMBER = "number"  # the choice that shows a field, and the field's name


@dataclass(frozen=True)
class Choice:
    """An input that is ``word``, or a number from ``least`` to ``most``; whole ones if ``start`` is.

    ``start`` is what the field shows first.  ``meant`` is the number that stood for the word in
    graphs of version 0.1.0.  ``asks`` is what the list calls the number; with ``number_first`` a
    new node begins with it.
    """

    name: str
    word: str
    meant: float
    start: float
    least: float
    most: float
    tooltip: str
    step: float | None = None
    asks: str = NUMBER
    number_first: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.start, int)

    def input(self, optional: bool = True, advanced: bool = True):
        """The input of a node's schema."""
        field = (io.Int if self.whole else io.Float).Input(
            NUMBER,
            default=self.start,
            min=self.least,
            max=self.most,
            step=self.step,
            advanced=advanced or None,
        )  # without a tooltip, which would hide the translated one (devtools/locales.py)
        options = [
            io.DynamicCombo.Option(self.word, []),
            io.DynamicCombo.Option(self.asks, [field]),
        ]
        return io.DynamicCombo.Input(
            self.name,
            options=options[::-1] if self.number_first else options,
            optional=optional,
            tooltip=self.tooltip,
            extra_dict={"advanced": advanced or None},
        )

    def value(self, given: Any) -> float | None:
        """The number that was chosen, None for the word; ValueError for anything else."""
        if isinstance(given, Mapping):  # of the list: what it says, and the field's number
            said = given.get(self.name)
            given = given.get(NUMBER, said) if said == self.asks else said
        if given is None or given == self.word:
            return None
        try:
            number = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number == self.meant:
            return None
        if not self.least <= number <= self.most:
            raise ValueError(
                f'{self.name}={shown(given)} must be "{self.word}" or a number from {self.least:g} to '
                f"{self.most:g}"
            )
        return int(number) if self.whole else number


def own_inputs(function: Callable) -> Callable:
    """Decorator of a node's function: it gets the inputs that it names, and no others.

    ComfyUI (0.30.0) gives each of them the choices too, whatever it names.  It looks at the
    signature to see what to check, so that stays as it is.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args, **given):
        known = {name: value for name, value in given.items() if name in signature.parameters}
        return function(*args, **known)

    called.__signature__ = signature
    return called


def with_choices(*choices: Choice) -> Callable:
    """Decorator of ``execute``: each choice reaches it as its number, or as None."""

    def decorate(function: Callable) -> Callable:
        own = own_inputs(function)

        @wraps(own)
        def called(*args, **given):
            numbers = {choice.name: choice.value(given.get(choice.name)) for choice in choices}
            return own(*args, **given | numbers)

        called.__signature__ = own.__signature__
        return called

    return decorate
