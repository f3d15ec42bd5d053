"""What both human-preference scorers are: a dual encoder of its own, fine-tuned on choices."""

from __future__ import annotations

from typing import Any

import torch

from .base import Batch
from .open_clip import DualEncoder


class Preference:
    """Cosine [n] between image and prompt in the scorer's own encoder, times ``scale``."""

    def __init__(self, name: str, encoder: DualEncoder, scale: float):
        self.name, self.encoder, self.scale = name, encoder, scale

    def score(self, batch: Batch) -> torch.Tensor:
        images = self.encoder.encode_images(batch.images)
        return self.scale * (images * self.encoder.encode_texts(batch.prompts)).sum(1)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "scale": self.scale, "encoder": self.encoder.describe()}
