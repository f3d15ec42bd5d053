"""Does every thing that the prompt names show?  Alignment by noun phrases (AQ).

    AQ(image, prompt) = mean over the prompt's phrases p of log(max(100 * cos(image, p), 1))

A single score of the whole prompt can be high while one of its things is missing.  The idea is
Q-Sched's alignment term (arXiv 2509.01624); the rules that cut the phrases and the mean are ours.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ..optional import missing
from .base import CLIP_SCALE, CLIP_SCORE_FLOOR, Batch, ScorerEntry, Sources
from .open_clip import FEATURE, INSTALL, DualEncoder

# Words between things, which are no part of one.
_BETWEEN = frozenset(
    """about above across after against along amid among and around as at atop before behind below
    beneath beside besides between beyond but by down during for from in inside into like near next
    of off on onto opposite or out outside over past through to toward towards under underneath up
    upon via while with within without is are was were be being been has have had wearing holding
    standing sitting lying looking facing that which who whose where""".split()  # noqa: SIM905
)
_ARTICLES = frozenset(
    "a an the some this these those its his her their my your our".split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\s]")


def noun_phrases(prompt: str) -> tuple[str, ...]:
    """The prompt's phrases in their order, each once: cut at prepositions, conjunctions, marks.

    The whole prompt where nothing is left.
    """
    phrases: dict[str, None] = {}
    words: list[str] = []
    for token in [*_WORD.findall(prompt), "."]:
        if token.lower() in _BETWEEN or not token[0].isalnum():
            if words:
                phrases[" ".join(words)] = None
            words = []
        elif words or token.lower() not in _ARTICLES:
            words.append(token)
    return tuple(phrases) or (prompt,)


class NounPhraseAlignment:
    """AQ [n], at least 0."""

    name = "aq"

    def __init__(self, encoder: DualEncoder):
        self.encoder = encoder

    def score(self, batch: Batch) -> torch.Tensor:
        scores = []
        for features, prompt in zip(batch.image_features, batch.prompts, strict=True):
            cosines = self.encoder.encode_texts(noun_phrases(prompt)) @ features
            scores.append((CLIP_SCALE * cosines).clamp(min=CLIP_SCORE_FLOOR).log().mean())
        return torch.stack(scores)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "version": 1, "encoder": self.encoder.describe()}


def _build(option: str, sources: Sources) -> NounPhraseAlignment:
    return NounPhraseAlignment(sources.encoder)


ENTRY = ScorerEntry(
    name="aq",
    measures="alignment",
    licence="open_clip: MIT; weights: their publishers' licences",
    available=lambda: missing("open_clip", FEATURE, INSTALL),
    build=_build,
)
