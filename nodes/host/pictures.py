"""Pictures between PIL and ComfyUI."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image

THUMBNAIL = 192  # pixels of the longer side


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as an IMAGE [1, height, width, 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def as_png(picture: Image.Image) -> bytes:
    """A picture as a file's content."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def shrink(images: torch.Tensor) -> torch.Tensor:
    """uint8 thumbnails of images [n, height, width, 3] in [0, 1]; small ones stay as they are."""
    x = images.movedim(-1, 1)
    scale = THUMBNAIL / max(x.shape[2:])
    if scale < 1:
        size = [max(1, round(s * scale)) for s in x.shape[2:]]
        x = torch.nn.functional.interpolate(
            x, size, mode="bicubic", antialias=True, align_corners=False
        )
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)


def contact_sheet(pictures: torch.Tensor, columns: int = 4) -> Image.Image:
    """uint8 pictures [n, height, width, 3] side by side."""
    columns = min(columns, len(pictures))
    height, width = pictures.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        place = (index % columns * width, index // columns * height)
        sheet.paste(Image.fromarray(picture.numpy()), place)
    return sheet
