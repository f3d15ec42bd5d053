"""Quality without a reference from antonym prompts: CLIP-IQA (Wang et al., arXiv 2207.12396)."""

from __future__ import annotations

from typing import Any

import torch

from ..optional import missing
from .base import Batch, ScorerEntry
from .open_clip import FEATURE, INSTALL, DualEncoder

PROMPTS = ("Good photo.", "Bad photo.")


class ClipIqa:
    """Probability [n] in [0, 1] that an image is the first of an antonym pair (section 3.1).

    Softmax over the two cosines times the encoder's logit scale; the same image features serve the
    alignment.
    """

    name = "clip_iqa"

    def __init__(self, encoder: DualEncoder, prompts: tuple[str, str] = PROMPTS):
        self.encoder, self.prompts = encoder, prompts

    def score(self, batch: Batch) -> torch.Tensor:
        good, bad = self.encoder.encode_texts(self.prompts)
        return torch.sigmoid(self.encoder.logit_scale * (batch.image_features @ (good - bad)))

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "prompts": list(self.prompts),
            "encoder": self.encoder.describe(),
        }


ENTRY = ScorerEntry(
    name="clip_iqa",
    measures="quality",
    licence="open_clip: MIT; weights: their publishers' licences",
    available=lambda: missing("open_clip", FEATURE, INSTALL),
    build=lambda option, sources: ClipIqa(sources.encoder),
)
