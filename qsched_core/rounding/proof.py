"""Whether calibrated weights are nearer to the unquantized model, on prompts that they never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from ..prompts import PromptSet
from ..source import Measure, ModelSource, in_levels
from ..statistics import Interval, paired_interval
from ..trajectory import Candidate, rollout
from .file import RoundedWeights
from .subject import Subject

MODELS = 3  # that are compared: unquantized, plain, calibrated
SCORING = 0.2  # of a model's part of the comparison, about, where its pictures are scored


@dataclass(frozen=True)
class Arm:
    """A model on held-out prompts: its final latents' distance, and JAQ where it was scored.

    ``distance`` has for each prompt the squared distance to the unquantized model's latents over
    their mean squared length: its mean is the relative latent distance.  ``detail`` is the energy of
    the latents' upper half of frequencies over that of the unquantized ones: below 1 is blurred.
    """

    distance: tuple[float, ...]
    detail: tuple[float, ...]
    jaq: tuple[float, ...] | None = None

    @property
    def mean(self) -> float:
        return sum(self.distance) / len(self.distance)

    @property
    def mean_detail(self) -> float:
        return sum(self.detail) / len(self.detail)

    def to_dict(self) -> dict[str, Any]:
        return {key: None if v is None else list(v) for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Arm:
        return cls(**{key: None if v is None else tuple(v) for key, v in content.items()})


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, its change of distance from plain to calibrated, and its pictures.

    ``pictures`` [3, height, width, 3], uint8: unquantized, plain, calibrated.
    """

    prompt: str
    change: float
    pictures: torch.Tensor


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

    @property
    def typical(self) -> list[int]:
        """The prompts with the worst, the median and the best change."""
        change = [b - a for a, b in zip(self.plain.distance, self.calibrated.distance, strict=True)]
        order = sorted(range(len(change)), key=change.__getitem__, reverse=True)
        return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))

    def samples(self, prompts: PromptSet, pictures: torch.Tensor | None) -> tuple[Sample, ...]:
        """The typical prompts with their pictures [samples, 3, height, width, 3], if there are."""
        if pictures is None:
            return ()
        return tuple(
            Sample(prompts.prompts[i], self.calibrated.distance[i] - self.plain.distance[i], each)
            for i, each in zip(self.typical, pictures, strict=True)
        )

    def whole(self) -> dict[str, Any]:
        """Every prompt's figures, as plain JSON for :meth:`of`."""
        scores = None if self.reference_jaq is None else list(self.reference_jaq)
        arms = {"plain": self.plain.to_dict(), "calibrated": self.calibrated.to_dict()}
        return arms | {"reference_jaq": scores}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Proof:
        scores = content["reference_jaq"]
        return cls(
            Arm.from_dict(content["plain"]),
            Arm.from_dict(content["calibrated"]),
            None if scores is None else tuple(scores),
        )

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "prompts": len(self.plain.distance),
            "distance": {"plain": self.plain.mean, "calibrated": self.calibrated.mean},
            "detail": {"plain": self.plain.mean_detail, "calibrated": self.calibrated.mean_detail},
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
def prove(
    subject: Subject,
    prompts: PromptSet,
    arms: Sequence[RoundedWeights],
    measure: Measure | None = None,
    samples: bool = False,
    on_prompts: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[Proof, torch.Tensor | None]:
    """Plain and calibrated weights (``arms``) on held-out prompts.

    With ``samples`` also the pictures of its typical prompts, for :meth:`Proof.samples`.
    ``on_prompts(done, total)`` is called after each step.
    """
    latents, scores, found = [], [], []
    total, scoring = MODELS * len(prompts), 0.0 if measure is None else SCORING
    for k, arm in enumerate((None, *arms)):

        def told(done: float, share: float, before: float = k * len(prompts)) -> None:
            on_prompts(before + share * done, total)

        def scored(done: int, before: float = (k + 1 - scoring) * len(prompts)) -> None:
            on_prompts(before + scoring * done, total)

        # One at a time is made: both quantized models need not be in memory together.
        with nullcontext(subject.source) if arm is None else subject.rounded(arm) as source:
            latents.append(final_latents(source, prompts, partial(told, share=1 - scoring)))
            scores.append(
                None if measure is None else jaq(source, latents[-1], prompts, measure, scored)
            )
        if len(latents) > 1:
            pair = (latents[-1], latents[0])
            found.append(Arm(distances(*pair), details(*pair), scores[-1]))
    proof = Proof(*found, scores[0])
    if not samples:
        return proof, None
    chosen = torch.stack([each[proof.typical] for each in latents], 1)  # [samples, 3, ...]
    pictures = torch.cat(list(pictures_of(subject.source, chosen.flatten(0, 1))))
    levels = (pictures * 255).round().to(torch.uint8)
    return proof, levels.unflatten(0, chosen.shape[:2])


@torch.no_grad()
def final_latents(
    source: ModelSource, prompts: PromptSet, on_prompts: Callable[[float], None] = lambda done: None
) -> torch.Tensor:
    """The latents [prompts, ...] at the end of the source's trajectory, on the CPU.

    ``on_prompts(done)`` is called after each step.
    """
    candidate = Candidate.identity(source.trajectory)
    found: list[torch.Tensor] = []

    def sampled(part: PromptSet, start: int) -> torch.Tensor:
        finished, steps = sum(map(len, found)), count(1)

        def stepped(state) -> None:
            source.interrupted()
            on_prompts(finished + len(part) * min(1.0, next(steps) / source.trajectory.steps))

        def run(model, x, sigmas, extra_args=None):
            result = rollout(
                model,
                x,
                sigmas,
                [candidate],
                info=source.info,
                seeds=part.seeds,
                extra_args=extra_args,
                callback=stepped,
            )
            return result.latents.flatten(0, 1)

        return source.sample(part, source.trajectory, 1, run).float().cpu()

    for _, latents in source.batches.each(sampled, prompts):
        found.append(latents)
        on_prompts(sum(map(len, found)))
    return torch.cat(found)


def pictures_of(source: ModelSource, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Batches of pictures, in the 256 levels of a picture file."""
    for part in latents.split(source.max_batch):
        source.interrupted()
        yield in_levels(source.decode(part).cpu())


def jaq(
    source: ModelSource,
    latents: torch.Tensor,
    prompts: PromptSet,
    measure: Measure,
    on_prompts: Callable[[int], None] = lambda done: None,
) -> tuple[float, ...]:
    """Scores of the pictures of ``latents``; ``on_prompts(done)`` is called after each batch."""
    scores: list[float] = []
    for pictures in pictures_of(source, latents):
        texts = prompts.prompts[len(scores) : len(scores) + len(pictures)]
        scores += measure.score(pictures, texts).jaq
        on_prompts(len(scores))
    return tuple(scores)


def distances(latents: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Squared distance of each prompt's latents to the reference's, over their mean squared length."""
    left = (latents - reference).flatten(1).square().sum(1)
    return tuple((left / reference.flatten(1).square().sum(1).mean()).tolist())


def details(latents: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Energy of each prompt's latents above half the highest frequency, over the reference's."""
    ours, theirs = _fine(latents), _fine(reference)
    return tuple((ours / theirs.clamp(min=1e-30)).tolist())


def _fine(latents: torch.Tensor) -> torch.Tensor:
    """Energy [prompts] of the frequencies of the last two axes, of which one is in the upper half."""
    spectrum = torch.fft.rfft2(latents.float()).abs().square()
    rows, columns = latents.shape[-2:]
    high = (torch.fft.fftfreq(rows).abs().unsqueeze(1) > 0.25) | (
        torch.fft.rfftfreq(columns) > 0.25
    )
    return (spectrum * high).flatten(1).sum(1)
