"""Widgets for the solvers' own options, made from the registry of solvers."""

from __future__ import annotations

from comfy_api.latest import io

from ..qsched_core.solvers import SOLVERS, get_solver

OWN = -1.0  # what a widget says for "the solver's own default": below every option's range


def option_inputs() -> list:
    """A number for each option that some solver has, all optional."""
    found: dict[str, list] = {}
    for solver in SOLVERS.values():
        for option in solver.options:
            found.setdefault(option.name, []).append((solver.name, option))
    return [
        io.Float.Input(
            name,
            default=OWN,
            min=OWN,
            max=max(option.maximum for _, option in users),
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="-1 is the solver's own default. "
            + " ".join(f"{solver} ({o.default:g}): {o.tooltip}" for solver, o in users),
        )
        for name, users in found.items()
    ]


def chosen_options(solver: str, eta: float = OWN, gamma: float = OWN) -> dict[str, float]:
    """The options that the user set; ValueError for one that ``solver`` does not have."""
    chosen = {k: v for k, v in (("eta", eta), ("gamma", gamma)) if v is not None and v != OWN}
    get_solver(solver).check(chosen)
    return chosen


def check_options(solver: str | None, eta: float | None, gamma: float | None) -> str | None:
    """What is wrong with the options, for a node's validation; a wired value (None) is not known yet."""
    if solver is None:
        return None
    try:
        chosen_options(solver, eta, gamma)
    except ValueError as error:
        return str(error)
    return None
