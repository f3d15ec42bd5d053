"""JAQ, the joint alignment-quality objective of Q-Sched (arXiv 2509.01624), defined once.

    JAQ(image, prompt) = alignment(image, prompt) + k * quality(image, prompt)

Higher is better; no reference image is needed.  A set's JAQ is the mean over its images.  Presets:

    clip+clipiqa        log(CLIPScore) + k * CLIP-IQA, the default
    clip+pyiqa:METRIC   log(CLIPScore) + k * a no-reference metric, turned so that higher is better
    aq+hps              AQ (the prompt's noun phrases, one by one) + k * HPS v2.1

CLIPScore = max(100 * cosine, 1) is that of arXiv 2104.08718 in the usual scale of 100; its floor of
1 (an image that has nothing to do with its prompt) keeps the logarithm finite.  CLIP-IQA (arXiv
2207.12396) lies in [0, 1].  The paper's k is 2.

Instead of a preset there may be a weighted sum of any scorers.  Scorers of alignment are added up
to the alignment, all others to the quality, and k = 1.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .scorers import (
    Batch,
    DualEncoder,
    Placement,
    ScorerError,
    Sources,
    build_scorer,
    check_images,
    check_scorer,
    scorer_names,
    stay,
)
from .text import shown

logger = logging.getLogger(__name__)

QUALITY_WEIGHT = 2.0
MAX_FORMULA, MAX_TERMS = 2048, 32  # characters and terms of a formula
# Scorers of which the logarithm is taken, and the name of the raw term.
LOGARITHMIC = {"clip": "clip_score"}


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
        return fmean(self.jaq)  # not sum(), which Python 3.12 rounds otherwise

    def means(self) -> dict[str, float]:
        """Mean of alignment, quality, jaq and of every term."""
        columns = {"alignment": self.alignment, "quality": self.quality, "jaq": self.jaq}
        return {name: fmean(v) for name, v in {**columns, **self.terms}.items()}

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


@dataclass(frozen=True)
class Term:
    """A scorer and its weight.  ScorerError for a weight that is no finite number above 0."""

    spec: str
    weight: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ScorerError(f"the weight {self.weight} of {shown(self.spec)} must be above 0")


@dataclass(frozen=True)
class Recipe:
    """What JAQ is made of: weighted terms of both kinds, and the k between them."""

    name: str
    alignment: tuple[Term, ...]
    quality: tuple[Term, ...]
    quality_weight: float = QUALITY_WEIGHT

    def __post_init__(self):
        if not (math.isfinite(self.quality_weight) and self.quality_weight >= 0):
            raise ScorerError(
                f"quality_weight={self.quality_weight} must be a number of at least 0"
            )
        if not self.alignment:
            raise ScorerError(
                f"formula={shown(self.name)} has no term that looks at the prompt; add "
                f"{' or '.join(scorer_names('alignment'))}"
            )
        seen: set[str] = set()
        for term in (*self.alignment, *self.quality):
            if term.spec in seen:
                raise ScorerError(
                    f"formula={shown(self.name)} has {shown(term.spec)} twice; add up its weights"
                )
            seen.add(term.spec)


def recipe_of(
    formula: str = "", quality: str = "clip_iqa", quality_weight: float = QUALITY_WEIGHT
) -> Recipe:
    """The objective that ``formula`` names.

    Empty: the preset clip with ``quality``.  A preset: ``clip+clipiqa``, ``clip+pyiqa:METRIC`` or
    ``aq+hps``, with k = ``quality_weight``.  Else a weighted sum such as
    ``clip + 2*clip_iqa + 0.5*pickscore``, in which ``quality_weight`` has no part.  ScorerError for
    what is none of these, for scorers that are unknown or not available, and for a text that is
    longer than any sum of scorers.
    """
    for name, given in (("formula", formula), ("quality", quality)):
        if not isinstance(given, str) or len(given) > MAX_FORMULA:
            raise ScorerError(
                f"{name}={shown(given)} must be text of at most {MAX_FORMULA} characters"
            )
    text = formula.strip()
    if not text:
        check_scorer(quality, "quality")
        name = f"clip+{quality.strip().replace('clip_iqa', 'clipiqa')}"
        return Recipe(name, (Term("clip"),), (Term(quality.strip()),), quality_weight)
    parts = [part.strip() for part in text.split("+")]
    if len(parts) > MAX_TERMS:
        raise ScorerError(
            f"formula={shown(formula)} has {len(parts)} terms; at most {MAX_TERMS} can be added up"
        )
    for first, second, alignment in (("clip", "clipiqa", "clip"), ("aq", "hps", "aq")):
        if parts == [first, second]:
            spec = {"clipiqa": "clip_iqa"}.get(second, second)
            return _recipe(text, [Term(alignment), Term(spec)], quality_weight)
    if len(parts) == 2 and parts[0] == "clip" and parts[1].startswith("pyiqa:"):
        return _recipe("+".join(parts), [Term("clip"), Term(parts[1])], quality_weight)
    return _recipe(text, [_term(part, text) for part in parts], 1.0)


def _recipe(name: str, terms: Sequence[Term], quality_weight: float) -> Recipe:
    kinds: dict[str, list[Term]] = {"alignment": [], "quality": []}
    for term in terms:
        entry, _ = check_scorer(term.spec, name="formula")
        kinds[entry.measures].append(term)
    return Recipe(name, tuple(kinds["alignment"]), tuple(kinds["quality"]), quality_weight)


def _term(part: str, formula: str) -> Term:
    weight, star, spec = part.rpartition("*")
    try:
        number = float(weight) if star else 1.0
    except ValueError:
        spec = ""
    if not spec.strip():
        raise ScorerError(
            f"formula={shown(formula)}: {shown(part)} is no term; write scorer or weight*scorer, joined by +, "
            f"with scorers {', '.join(scorer_names())}"
        )
    return Term(spec.strip(), number)


class Objective:
    """JAQ as a recipe says: scorers of both kinds, built and checked.

    ``formula``, ``quality`` (a quality scorer's name: ``clip_iqa``, ``pyiqa:METRIC``, ...) and
    ``quality_weight``, the k of the definition, are those of :func:`recipe_of`.  ``place`` brings a
    scorer to its device before use; ``files`` are the weights of scorers that have their own;
    ``allow_download`` lets scorers fetch theirs.  Text features are kept, so a prompt is encoded once.
    ScorerError for scorers that are unknown or
    unavailable, weights that are missing or broken, and numbers that are out of range.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        quality: str = "clip_iqa",
        quality_weight: float = QUALITY_WEIGHT,
        place: Placement = stay,
        formula: str = "",
        files: Mapping[str, Path] | None = None,
        allow_download: bool = False,
    ):
        self.recipe = recipe_of(formula, quality, quality_weight)
        self.encoder, self.quality_weight = encoder, float(self.recipe.quality_weight)
        sources = Sources(encoder, place, dict(files or {}), allow_download)
        self.alignment, self.quality = (
            [(term.weight, build_scorer(term.spec, sources)) for term in terms]
            for terms in (self.recipe.alignment, self.recipe.quality)
        )

    @property
    def preset(self) -> str:
        """The objective's name: a preset's, or the weighted sum itself."""
        return self.recipe.name

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of images [n, height, width, 3] in [0, 1] with a prompt each.

        ScorerError for images that don't fit, and when a scorer's output is no finite number.
        """
        check_images(images, prompts)
        batch = Batch(images, tuple(prompts), self.encoder)
        terms: dict[str, tuple[float, ...]] = {}
        parts = []
        for scorers in (self.alignment, self.quality):
            total = torch.zeros(len(prompts), dtype=torch.float64)
            for weight, scorer in scorers:
                raw = self._checked(scorer, batch)
                terms[LOGARITHMIC.get(scorer.name, scorer.name)] = tuple(raw.tolist())
                total += weight * (raw.log() if scorer.name in LOGARITHMIC else raw)
            parts.append(total)
        alignment, quality = parts
        jaq = alignment + self.quality_weight * quality
        return Scores(
            tuple(alignment.tolist()), tuple(quality.tolist()), tuple(jaq.tolist()), terms
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
                f"{scorer.name} gave {float(scores[bad[0]])} for prompt {shown(batch.prompts[bad[0]])}; "
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

        def described(scorers) -> list[dict[str, Any]]:
            return [{"weight": weight, **scorer.describe()} for weight, scorer in scorers]

        return json.loads(
            json.dumps(
                {
                    "preset": self.preset,
                    "formula": "alignment + k*quality; alignment of clip: log(max(100*cosine, 1))",
                    "quality_weight": self.quality_weight,
                    "alignment": described(self.alignment),
                    "quality": described(self.quality),
                }
            )
        )
