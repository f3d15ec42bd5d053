"""Feature spaces in which sets of images are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..scorers import DualEncoder


@dataclass(frozen=True)
class FeatureSpace:
    """``encode`` gives images [n, height, width, 3] in [0, 1] features [n, dim] (float32, CPU).

    ``description`` is plain JSON that fixes the features; ``note`` is what a reader of distances in
    them has to know.
    """

    name: str
    encode: Callable[[torch.Tensor], torch.Tensor]
    description: Mapping[str, Any]
    note: str = ""


def encoder_space(encoder: DualEncoder) -> FeatureSpace:
    """The unit-length image features of an open_clip encoder."""
    return FeatureSpace(
        "open_clip",
        encoder.encode_images,
        {"features": "open_clip", "encoder": encoder.describe()},
    )
