"""Whether calibrated weights are nearer to the unquantized model, on prompts that they never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..prompts import PromptSet
from ..source import Measure, in_levels
from ..statistics import Interval, paired_interval
from ..task import Task, TaskSource
from ..trajectory import Candidate, rollout


@dataclass(frozen=True)
class Arm:
    """A model on held-out prompts: its final latents' distance, and JAQ where it was scored.

    ``distance`` has for each prompt the squared distance to the unquantized model's latents over
    their mean squared length: its mean is the relative latent distance.
    """

    distance: tuple[float, ...]
    jaq: tuple[float, ...] | None = None

    @property
    def mean(self) -> float:
        return sum(self.distance) / len(self.distance)


@dataclass(frozen=True)
class Proof:
    """Plain and calibrated rounding on the same held-out prompts, seeds and steps."""

    plain: Arm
    calibrated: Arm
    reference_jaq: tuple[float, ...] | None = None

    @property
    def change(self) -> Interval:
        """Of the distance, from plain to calibrated: below 0 is nearer."""
        return paired_interval(self.plain.distance, self.calibrated.distance)

    @property
    def gain(self) -> Interval | None:
        """Of JAQ, from plain to calibrated."""
        if self.plain.jaq is None or self.calibrated.jaq is None:
            return None
        return paired_interval(self.plain.jaq, self.calibrated.jaq)

    @property
    def holds(self) -> bool:
        """Whether the distance falls, by more than chance."""
        return self.change.high < 0

    def to_dict(self) -> dict:
        content = {
            "prompts": len(self.plain.distance),
            "distance": {"plain": self.plain.mean, "calibrated": self.calibrated.mean},
            "change": self.change.to_dict(),
            "holds": self.holds,
        }
        if self.gain is not None:
            content["jaq"] = {
                "unquantized": _mean(self.reference_jaq),
                "plain": _mean(self.plain.jaq),
                "calibrated": _mean(self.calibrated.jaq),
                "gain": self.gain.to_dict(),
            }
        return content


def _mean(values) -> float | None:
    return None if values is None else sum(values) / len(values)


@torch.no_grad()
def final_latents(task: Task, prompts: PromptSet) -> torch.Tensor:
    """The latents [prompts, ...] at the end of the task's trajectory, on the CPU."""
    source = TaskSource(task, 0)
    candidate = Candidate.identity(task.trajectory)
    found = []
    for start in range(0, len(prompts), task.max_batch):
        part = prompts.part(start, start + task.max_batch)

        def run(model, x, sigmas, extra_args=None, part=part):
            result = rollout(
                model,
                x,
                sigmas,
                [candidate],
                info=task.info,
                seeds=part.seeds,
                extra_args=extra_args,
            )
            return result.latents.flatten(0, 1)

        found.append(source.sample(part, task.trajectory, 1, run).float().cpu())
    return torch.cat(found)


def jaq(
    task: Task, latents: torch.Tensor, prompts: PromptSet, measure: Measure
) -> tuple[float, ...]:
    """Scores of the pictures of ``latents``, in the 256 levels of a picture file."""
    device = task.initial(prompts.seeds[:1]).device
    scores: list[float] = []
    for start in range(0, len(prompts), task.max_batch):
        part = slice(start, start + task.max_batch)
        pictures = in_levels(task.decode(latents[part].to(device)).cpu())
        scores += measure.score(pictures, prompts.prompts[part]).jaq
    return tuple(scores)


def distances(latents: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Squared distance of each prompt's latents to the reference's, over their mean squared length."""
    left = (latents - reference).flatten(1).square().sum(1)
    return tuple((left / reference.flatten(1).square().sum(1).mean()).tolist())
