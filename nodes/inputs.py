"""Inputs that several nodes share, and what they make of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from comfy_api.latest import io

from ..qsched_core.solvers import SOLVERS, get_solver
from ..qsched_core.trajectory import MEMO_BYTES
from .choices import Choice, with_choices
from .host.source import ComfySource
from .host.trajectories import SCHEDULERS, trajectory_of
from .types import Objective, Prompts


def _option_choices() -> dict[str, Choice]:
    """By name: a choice for each option that some solver has."""
    found: dict[str, list] = {}
    for solver in SOLVERS.values():
        for option in solver.options:
            found.setdefault(option.name, []).append((solver.name, option))
    return {
        name: Choice(
            name,
            word="solver's own",
            meant=-1.0,
            start=max(option.default for _, option in users),
            least=min(option.minimum for _, option in users),
            most=max(option.maximum for _, option in users),
            step=0.01,
            tooltip="An option of some solvers, whose own values are in parentheses. "
            + " ".join(f"{solver} ({o.default:g}): {o.tooltip}" for solver, o in users),
        )
        for name, users in found.items()
    }


OPTIONS = _option_choices()


def option_inputs() -> list:
    """An input for each option that some solver has, all optional."""
    return [choice.input() for choice in OPTIONS.values()]


def collected(argument: str, names: Iterable[str], default: Any = None) -> Callable:
    """Decorator: the inputs ``names`` reach the function as one dict, its ``argument``.

    ComfyUI passes inputs by name and inspects the signature.  So the decorated function shows an
    argument for each name.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.name != argument]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        inputs = [inspect.Parameter(name, kind, default=default) for name in names]

        @wraps(function)
        def called(*args, **given):
            chosen = {name: given.pop(name) for name in names if name in given}
            return function(*args, **{argument: chosen}, **given)

        called.__signature__ = signature.replace(parameters=[*own, *inputs])
        return called

    return decorate


def with_options(function: Callable) -> Callable:
    """Decorator: the solvers' options reach a node's function as one dict, ``options``."""
    return with_choices(*OPTIONS.values())(collected("options", OPTIONS)(function))


def checked_options(solver: str, options: dict[str, float | None]) -> dict[str, float]:
    """The options that the user set; ValueError for one that ``solver`` does not have."""
    chosen = {name: value for name, value in options.items() if value is not None}
    get_solver(solver).check(chosen)
    return chosen


def cfg_input():
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Guidance; few-step models are made for 1.",
    )


def trajectory_inputs(lazy: Sequence[str] = ()) -> list:
    """The inputs that choose model and trajectory, alike in every node that makes images.

    Those that ``lazy`` names are evaluated when the node asks for them.
    """
    inputs = [
        io.Model.Input("model", tooltip="The model, quantized or not."),
        io.Clip.Input("clip", tooltip="The text encoder that the model samples with."),
        io.Vae.Input("vae", tooltip="Turns latents into the pictures that are scored."),
        Prompts.Input("prompts", tooltip="From Calibration Prompts."),
        Objective.Input("objective", tooltip="From JAQ Objective: what a good picture is."),
        io.Combo.Input("solver", options=list(SOLVERS), tooltip="The base solver."),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default="simple",
            tooltip="The noise levels, as in KSampler.",
        ),
        io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps."),
        cfg_input(),
        io.Int.Input(
            "width", default=512, min=16, max=16384, step=8, tooltip="Of the pictures, in pixels."
        ),
        io.Int.Input(
            "height", default=512, min=16, max=16384, step=8, tooltip="Of the pictures, in pixels."
        ),
    ]
    for entry in inputs:
        entry.lazy = entry.id in lazy or None
    return inputs


def negative_input():
    return io.String.Input(
        "negative",
        default="",
        multiline=True,
        optional=True,
        tooltip="Negative prompt; it has no effect at cfg 1.",
    )


def source_of(
    model, clip, vae, solver, scheduler, steps, cfg, width, height, negative, options,
    memory=MEMO_BYTES,
) -> ComfySource:  # fmt: skip
    """The pictures of a model on KSampler's trajectory."""
    trajectory = trajectory_of(model, solver, scheduler, steps, checked_options(solver, options))
    return ComfySource(
        model, clip, vae, trajectory, cfg=cfg, negative=negative, width=width, height=height,
        memory=memory, scheduler=scheduler,
    )  # fmt: skip
