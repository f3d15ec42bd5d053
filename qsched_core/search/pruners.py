"""Pruning: candidates that are plainly worse don't see every prompt.

Prompts are the resource: a candidate is scored on a few, then on more, and Optuna's pruners decide
in between.  Seeds are the same for every candidate, so a comparison is paired by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..optional import missing, require
from ..study.errors import CalibrationError
from ..text import shown
from .samplers import quiet

FIRST_SHARE = 1 / 4  # share of the prompts before the first decision
Values = Sequence[float]


@dataclass(frozen=True)
class Pruner:
    """A registry entry; ``build(optuna, prompts)`` makes Optuna's pruner, ``report`` what it reads.

    ``report`` turns the scores of the first prompts into the value at the last of them.
    """

    name: str
    summary: str
    build: Callable[[Any, int], Any]
    report: Callable[[Values], float]
    packages: tuple[str, ...] = ("optuna", "scipy")

    def available(self) -> str | None:
        """Why this can't run here, with the fix, or None."""
        reasons = (missing(name, f"fidelity {self.name!r}", name) for name in self.packages)
        return next(filter(None, reasons), None)


def _wilcoxon(optuna, prompts):
    return optuna.pruners.WilcoxonPruner(p_threshold=0.1)


def _hyperband(optuna, prompts):
    first = max(1, math.ceil(prompts * FIRST_SHARE))
    return optuna.pruners.HyperbandPruner(
        min_resource=first, max_resource=prompts, reduction_factor=2
    )


PRUNERS: dict[str, Pruner] = {
    entry.name: entry
    for entry in (
        Pruner("full", "every candidate sees every prompt", lambda *_: None, fmean),
        Pruner(
            "wilcoxon",
            "stop where a signed-rank test says a candidate is below the best, prompt by prompt",
            _wilcoxon,
            lambda values: values[-1],
        ),
        Pruner(
            "hyperband",
            "stop the lower half on a quarter, then half of the prompts",
            _hyperband,
            fmean,
        ),
    )
}


def get_pruner(name: str) -> Pruner:
    """CalibrationError, naming the known ones, for an unknown pruner."""
    if name not in PRUNERS:
        raise CalibrationError(
            f"fidelity={shown(name)} is unknown; choose one of {', '.join(PRUNERS)}"
        )
    return PRUNERS[name]


def rungs(prompts: int) -> list[int]:
    """After how many prompts to decide: a quarter, half, all."""
    counts = {math.ceil(prompts * share) for share in (FIRST_SHARE, 2 * FIRST_SHARE, 1)}
    return sorted(counts)


class Judge:
    """Decides on one candidate after another, each compared with the finished ones.

    ``finished`` are per-prompt values in the order of trials; pruned ones are shorter.
    """

    def __init__(self, pruner: Pruner, prompts: int, finished: Sequence[Values]):
        optuna = require("optuna", "the search", "optuna")
        self.pruner, self.prompts = pruner, prompts
        with quiet(optuna):
            # Hyperband deals brackets by the study's name
            self.study = optuna.create_study(
                direction="maximize", study_name="fidelity", pruner=pruner.build(optuna, prompts)
            )
        # A pruner stores its state in the trials that it has judged: let it judge them again.
        state = optuna.trial.TrialState
        for values in finished:
            self._begin()
            for stop in (n for n in rungs(prompts) if n <= len(values)):
                self.give_up(values[:stop])
            whole = len(values) == prompts
            self.study.tell(
                self.trial,
                fmean(values) if whole else None,
                state.COMPLETE if whole else state.PRUNED,
            )
        self._begin()

    def _begin(self) -> None:
        self.trial, self.told = self.study.ask(), 0

    def give_up(self, values: Values) -> bool:
        """Whether to give a candidate up, from its scores on the first prompts."""
        for step in range(self.told + 1, len(values) + 1):
            self.trial.report(self.pruner.report(values[:step]), step)
        self.told = len(values)
        with quiet(require("optuna", "the search", "optuna")):
            return self.trial.should_prune() and len(values) < self.prompts
