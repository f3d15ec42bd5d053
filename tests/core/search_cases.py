"""A model whose best coefficients are known, for the tests of the search: what is run on it."""

from __future__ import annotations

import random

from planted import READER, Planted

from qsched_core.calibration import calibrate
from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.prompts import CalibrationPrompts
from qsched_core.search import STRATEGIES, CalibrationSettings, Monitor
from qsched_core.study import StudyPlace

BEST = ScalarCorrection((1.06, 1.0, 1.03, 0.99), (0.92, 0.97, 1.0, 1.04))
PROMPTS = CalibrationPrompts.of(
    [f"a thing {i}" for i in range(10)], [f"another {i}" for i in range(12)], 3
)
SMALL = {name: 16 if name == "grid" else 30 if "+" in name else 20 for name in STRATEGIES}
SMALL |= {"tpe": 40, "tpe+steps": 60}  # it learns slowest
SMALL["levels-dp"] = 3  # it proposes no more
SMALL["levels-tpe"] = SMALL["levels-dp+tpe"] = 40
SMALL["levels-dp+gp"] = 20
SMALL["solvers"] = SMALL["solvers-gp"] = 40
SMALL["ranking"] = 60


class World(Planted):
    """A made-up model: JAQ falls with the squared distance from ``best``, a little by prompt."""

    def __init__(self, best=BEST, heldout_best=None, noise=0.0, **more):
        super().__init__(**more)
        self.best, self.heldout_best, self.noise = best, heldout_best or best, noise
        self.calls: list[int] = []

    def __call__(self, candidates, prompts):
        self.calls.append(len(candidates))
        self.nfe += len(prompts) * (3 * len(candidates) + 1)
        best = self.best if prompts == PROMPTS.calibration else self.heldout_best
        return [self.score(candidate.correction, best, prompts) for candidate in candidates]

    def score(self, correction, best, prompts):
        pairs = zip(correction.c_x + correction.c_eps, best.c_x + best.c_eps, strict=True)
        distance = sum((a - b) ** 2 for a, b in pairs)
        jaq = []
        for seed in prompts.seeds:
            chance = random.Random(f"{seed}{correction}").gauss(0, self.noise) if self.noise else 0
            jaq.append(4 + seed % 89 / 89 - (3 + seed % 7 / 7) * distance + chance)
        return Scores(tuple(v - 1 for v in jaq), (0.5,) * len(jaq), tuple(jaq))


class CrashError(Exception):
    pass


class CrashingWorld(World):
    """Fails every call once before it answers."""

    def __call__(self, corrections, prompts):
        self.fail = not getattr(self, "fail", False)
        if self.fail:
            raise CrashError
        return super().__call__(corrections, prompts)


def run(world, folder, settings=None, prompts=PROMPTS, reference=None, **told):
    settings, place = settings or CalibrationSettings("grid", 16), StudyPlace(folder)
    return calibrate(world, READER, prompts, settings, place, reference, Monitor(**told))


def outcome(result):
    return (
        result.schedule.candidate,
        result.best,
        result.verdict,
        [(t.number, t.stage, t.candidate, t.scores) for t in result.trials],
        result.heldout,
    )
