"""Made-up models and scores for the tests of evaluations."""

from __future__ import annotations

import torch

from qsched_core.correction import ScalarCorrection
from qsched_core.evaluation import Arm, FeatureSpace, evaluate
from qsched_core.objective import Scores
from qsched_core.prompts import PromptSet
from qsched_core.trajectory import Candidate, Trajectory

TRAJECTORY = Trajectory.of((1.0, 0.0))


def candidate(c_x: float) -> Candidate:
    return Candidate(TRAJECTORY, ScalarCorrection((c_x,), (1.0,)))


ONE, OTHER = candidate(1.0), candidate(1.1)


class StopError(Exception):
    """The end of a run in the middle."""


class PaintSource:
    """Noise of a prompt's seed, brighter by ``light`` and by the coefficient; stops when told to."""

    trajectory, width, height, max_batch = TRAJECTORY, 12, 8, 16

    def __init__(self, light: float = 0.0, stop_after: int | None = None, model: str = "int2"):
        self.light, self.stop_after, self.model = light, stop_after, model
        self.nfe = 0
        self.calls: list[tuple[int, int]] = []

    def describe(self):
        return {"model": self.model}

    def images(self, prompts, candidates, on_step=None):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise StopError
        self.calls.append((len(candidates), len(prompts)))
        self.nfe += len(prompts) * (2 * len(candidates) + 1)
        for _ in range(3):
            if on_step is not None:
                on_step()
        noise = torch.stack(
            [
                torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(seed % 2**31))
                for seed in prompts.seeds
            ]
        )
        return torch.stack([noise * 0.5 + self.light + c.correction.c_x[0] - 1 for c in candidates])


class Brightness:
    """An objective: alignment is the mean pixel, quality the first one's red."""

    def __init__(self, weight: float = 2.0):
        self.weight = weight

    def score(self, images, prompts):
        a, q = images.double().mean((1, 2, 3)), images[:, 0, 0, 0].double()
        jaq = (a + self.weight * q).tolist()
        return Scores(a.tolist(), q.tolist(), jaq, {"mean": a.tolist()})

    def describe(self):
        return {"brightness": self.weight}


def space(name: str = "pixels", note: str = "") -> FeatureSpace:
    return FeatureSpace(name, lambda x: x[:, ::4, ::4].reshape(len(x), -1), {"name": name}, note)


def prompt_set(count: int, first: int = 1) -> PromptSet:
    return PromptSet(
        tuple(f"thing {i}" for i in range(count)), tuple(range(first, first + 4 * count, 4))
    )


def three_arms(reference=None, model=None) -> list[Arm]:
    reference, model = reference or PaintSource(0.2, model="full"), model or PaintSource(0.1)
    return [
        Arm("baseline", reference, ONE),
        Arm("quantized", model, ONE, "quantized (int2)"),
        Arm("schedule", model, OTHER, "int2 + schedule"),
    ]


def evaluated(folder, arms=None, count=10, **more):
    arguments = {"objective": Brightness(), "spaces": [space()], "part": 4} | more
    return evaluate(
        three_arms() if arms is None else arms, prompt_set(count), folder=folder, **arguments
    )
