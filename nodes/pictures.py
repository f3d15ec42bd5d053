"""Pictures between PIL and ComfyUI."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as an IMAGE [1, height, width, 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
