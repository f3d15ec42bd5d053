"""Inputs that are links or text: a graph for scripts may have any value in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..qsched_core.errors import plainly_named
from ..qsched_core.objective import Objective
from ..qsched_core.prompts import CalibrationPrompts
from ..qsched_core.schedule import QSchedule
from ..qsched_core.text import shown


@plainly_named
class LinkError(ValueError):
    """An input is no link to what it needs."""


def _has(*names: str) -> Callable[[Any], bool]:
    """Other packs have models and encoders of their own classes: only what is used must be there."""
    return lambda value: all(hasattr(value, name) for name in names)


# By kind: whether a value is one, and which node gives it.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_has("model_options", "get_model_object"), "a loader of models"),
    "clip": (_has("tokenize", "patcher"), "a loader of text encoders"),
    "vae": (_has("decode"), "a loader of VAEs"),
    "sampler": (_has("sample"), "a node that selects a sampler"),
    "schedule": (lambda value: isinstance(value, QSchedule), "a node that gives a schedule"),
    "prompts": (lambda value: isinstance(value, CalibrationPrompts), "Calibration Prompts"),
    "objective": (lambda value: isinstance(value, Objective), "JAQ Objective"),
}


def wired(*names: str, **kinds: str) -> Callable:
    """Decorator of ``execute``: LinkError unless the inputs ``names`` are what they are called.

    ``kinds`` are inputs whose name is not their kind's.  Unconnected ones (None) pass.
    """
    wanted = {name: _KINDS[name] for name in names}
    wanted |= {name: _KINDS[kind] for name, kind in kinds.items()}

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def called(*args, **given):
            found = signature.bind_partial(*args, **given).arguments
            for name, (is_one, giver) in wanted.items():
                value = found.get(name)
                if value is not None and not is_one(value):
                    raise LinkError(f"{name}={shown(value)} must come from {giver}; connect it")
            return function(*args, **given)

        called.__signature__ = signature
        return called

    return decorate


def text_only(function: Callable) -> Callable:
    """Decorator of ``validate_inputs``, of inputs that are text: says so of one that is not.

    Unconnected and wired ones (None) pass.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args, **given):
        for name, value in signature.bind_partial(*args, **given).arguments.items():
            if name != "cls" and value is not None and not isinstance(value, str):
                return f"{name}={shown(value)} must be text"
        return function(*args, **given)

    called.__signature__ = signature
    return called
