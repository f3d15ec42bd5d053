"""What a feature space is, in which sets of images are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


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
