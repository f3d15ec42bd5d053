"""JAQ, the joint alignment-quality objective of Q-Sched (arXiv 2509.01624), defined once.

    JAQ(image, prompt) = log(CLIPScore(image, prompt)) + k * quality(image)
    CLIPScore = max(100 * cosine, 1)

Higher is better; no reference image is needed.  CLIPScore is that of arXiv 2104.08718 in the usual
scale of 100; its floor of 1 (an image that has nothing to do with its prompt) keeps the logarithm
finite.  Quality is CLIP-IQA (arXiv 2207.12396) in [0, 1], or another no-reference metric in its own
scale, turned so that higher is better.  The paper's k is 2.  A set's JAQ is the mean over its
images.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .scorers import Batch, DualEncoder, Placement, ScorerError, build_scorer, check_images, stay

logger = logging.getLogger(__name__)

CLIP_SCALE, CLIP_SCORE_FLOOR = 100.0, 1.0
QUALITY_WEIGHT = 2.0


@dataclass(frozen=True)
class Scores:
    """What n images scored, higher is better: tuples of n finite numbers.

    ``terms`` holds every scorer's own output by its name.  ScorerError if lengths differ or a
    number is not finite.
    """

    alignment: tuple[float, ...]
    quality: tuple[float, ...]
    jaq: tuple[float, ...]
    terms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("alignment", "quality", "jaq"):
            values = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != len(self.alignment):
                raise ScorerError(
                    f"{name} has {len(values)} scores but alignment {len(self.alignment)}"
                )
            for position, value in enumerate(values):
                if not math.isfinite(value):
                    raise ScorerError(
                        f"{name} of image {position + 1} of {len(values)} is {value}; "
                        "a score must be a finite number: choose another scorer"
                    )
        terms = {name: tuple(float(v) for v in values) for name, values in self.terms.items()}
        object.__setattr__(self, "terms", terms)

    def __len__(self) -> int:
        return len(self.jaq)

    def mean(self) -> float:
        """The set's JAQ."""
        return sum(self.jaq) / len(self.jaq)

    def means(self) -> dict[str, float]:
        """Mean of alignment, quality, jaq and of every term."""
        columns = {"alignment": self.alignment, "quality": self.quality, "jaq": self.jaq}
        return {name: sum(v) / len(v) for name, v in {**columns, **self.terms}.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "alignment": list(self.alignment),
            "quality": list(self.quality),
            "jaq": list(self.jaq),
            "terms": {name: list(values) for name, values in self.terms.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scores:
        return cls(
            content["alignment"], content["quality"], content["jaq"], content.get("terms", {})
        )

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several sets of images as one."""
        columns = [
            tuple(value for part in parts for value in getattr(part, name))
            for name in ("alignment", "quality", "jaq")
        ]
        terms = {
            name: tuple(value for part in parts for value in part.terms[name])
            for name in parts[0].terms
        }
        return cls(*columns, terms)


class Objective:
    """JAQ with one dual encoder and one quality scorer.

    ``quality`` is a quality scorer's name (``clip_iqa``, or ``pyiqa:METRIC``), ``quality_weight``
    the k of the definition.  ``place`` brings a scorer to its device before use.  Text features are
    kept, so a prompt is encoded once.  ScorerError for a quality that is unknown or unavailable and
    for a weight that is negative or not finite.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        quality: str = "clip_iqa",
        quality_weight: float = QUALITY_WEIGHT,
        place: Placement = stay,
    ):
        if not (math.isfinite(quality_weight) and quality_weight >= 0):
            raise ScorerError(f"quality_weight={quality_weight} must be a number of at least 0")
        self.encoder, self.quality_weight = encoder, float(quality_weight)
        self.alignment = build_scorer("open_clip", "alignment", encoder, place)
        self.quality = build_scorer(quality, "quality", encoder, place)

    @property
    def preset(self) -> str:
        """The objective's name: ``clip+clipiqa`` or ``clip+pyiqa:METRIC``."""
        return f"clip+{self.quality.name.replace('clip_iqa', 'clipiqa')}"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of images [n, height, width, 3] in [0, 1] with a prompt each.

        ScorerError for images that don't fit, and when a scorer's output is no finite number.
        """
        check_images(images, prompts)
        batch = Batch(images, tuple(prompts), self.encoder)
        cosine = self._checked(self.alignment, batch)
        quality = self._checked(self.quality, batch)
        clip_score = (CLIP_SCALE * cosine).clamp(min=CLIP_SCORE_FLOOR)
        alignment = clip_score.log()
        jaq = alignment + self.quality_weight * quality
        return Scores(
            tuple(alignment.tolist()),
            tuple(quality.tolist()),
            tuple(jaq.tolist()),
            {"clip_score": tuple(clip_score.tolist()), self.quality.name: tuple(quality.tolist())},
        )

    @staticmethod
    def _checked(scorer, batch: Batch) -> torch.Tensor:
        scores = scorer.score(batch).double()
        if scores.shape != (len(batch.prompts),):
            raise ScorerError(
                f"{scorer.name} gave scores of shape {list(scores.shape)} for {len(batch.prompts)} "
                "images; it must give one an image"
            )
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if bad:
            raise ScorerError(
                f"{scorer.name} gave {float(scores[bad[0]])} for prompt {batch.prompts[bad[0]]!r}; "
                "a score must be a finite number: choose another scorer"
            )
        if len(scores) > 1 and bool((scores == scores[0]).all()):
            logger.warning(
                "%s gave %d images the same score, %g: it can't tell them apart",
                scorer.name,
                len(scores),
                float(scores[0]),
            )
        return scores

    def describe(self) -> dict[str, Any]:
        """Plain JSON that fixes the objective; equal descriptions score equally."""
        return json.loads(
            json.dumps(
                {
                    "preset": self.preset,
                    "formula": "log(max(100*cosine, 1)) + k*quality",
                    "quality_weight": self.quality_weight,
                    "alignment": self.alignment.describe(),
                    "quality": self.quality.describe(),
                }
            )
        )
