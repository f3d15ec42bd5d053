"""What proposes the next point: Optuna's samplers, asked anew for every trial.

A proposal depends on the seed, the stage, the slot and the finished trials alone.  A sampler that
lives on has state that a killed run loses, and that another worker does not have.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..optional import missing, require
from ..study.journal import distributions, finished_trial
from ..study.store import Point
from .space import Space

Past = Sequence[tuple[Point, float]]
DIGITS = 4  # of a proposed coefficient: precise enough, and without the last bits of a GPU


@dataclass(frozen=True)
class Sampler:
    """A registry entry; ``build(optuna, seed)`` makes Optuna's sampler.

    ``replay`` marks a sampler that has to be told of every trial in turn; the others read the
    finished trials from the study.
    """

    name: str
    summary: str
    build: Callable[[Any, int], Any]
    packages: tuple[str, ...] = ("optuna",)
    replay: bool = False

    def available(self) -> str | None:
        """Why this sampler can't run here, with the fix, or None."""
        reasons = (missing(name, f"search {self.name!r}", name) for name in self.packages)
        return next(filter(None, reasons), None)


def _gp(optuna, seed):
    # Chosen on noisy quadratics in 8 dimensions (medians of 6): after 40 trials it has a fifth to a
    # half of the regret that CMA-ES and TPE have, for about 0.3 s a proposal on one CPU core.
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)


def _tpe(optuna, seed):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True)


def _cmaes(optuna, seed):
    # starts in the middle of the box, at the base solver or near it
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=0)


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("gp", "Gaussian process", _gp, ("optuna", "scipy")),
        Sampler("tpe", "tree-structured Parzen estimator", _tpe),
        Sampler("cmaes", "CMA-ES", _cmaes, ("optuna", "cmaes"), replay=True),
    )
}


@contextmanager
def quiet(optuna) -> Iterator[None]:
    """Silences Optuna's log lines: every proposal makes a study in memory."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def suggest(
    sampler: str, space: Space, past: Past, seed: int, stage: str, slot: int
) -> dict[str, float]:
    """The point of ``space`` to try next, ``past`` being (point, value) pairs, higher is better."""
    entry = SAMPLERS[sampler]
    optuna = require("optuna", "the search", "optuna")
    # CMA-ES is replayed and continues its own draws, so its seed is fixed; the others get a new
    # seed each time.
    number = stage if entry.replay else f"{stage}/{slot}"
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    with quiet(optuna):
        built = entry.build(optuna, int.from_bytes(digest[:4], "little"))
        study = optuna.create_study(direction="maximize", sampler=built)
        ask = _replayed if entry.replay else _told
        # ComfyUI runs nodes in inference mode; fitting the Gaussian process needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            found = ask(study, space, past)
    return {
        name: min(max(round(float(found[name]), DIGITS), low), high)
        for name, (low, high) in space.bounds.items()
    }


def _told(study, space: Space, past: Past) -> Mapping[str, float]:
    study.add_trials([finished_trial(space, point, value) for point, value in past])
    return study.ask(distributions(space)).params


def _replayed(study, space: Space, past: Past) -> Mapping[str, float]:
    box = distributions(space)
    for point, value in past:
        study.enqueue_trial(dict(point))
        study.tell(study.ask(box), value)
    return study.ask(box).params
