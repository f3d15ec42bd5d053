"""What an evaluation keeps on disk: a folder for each arm, a file for each part of its prompts.

Pictures and features are on disk alone: memory does not grow with the number of pictures.

A part is one safetensors file: features, the pictures as PNG, and the scores as JSON in the header.
It is written whole or not at all: a killed run leaves finished parts.  Its name determines its
content: two runs at once can share a folder.  A checksum in the
header is of all else: what was damaged on the disk is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..errors import plainly_named
from ..files import disk_error, write_atomic
from ..objective import Scores

logger = logging.getLogger(__name__)

CONTENT, SUM = "qsched_evaluation", "sha256"
FEATURES, PICTURE = "features:", "picture:"


@plainly_named
class EvaluationError(ValueError):
    """An evaluation that can not start or go on; the message says what to change."""


@dataclass(frozen=True)
class Part:
    """The prompts ``start`` .. ``start + n - 1`` of an arm: their scores, and what they cost."""

    start: int
    scores: Scores
    seconds: float
    nfe: int

    def __len__(self) -> int:
        return len(self.scores)


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as uint8, to the nearest of 256 levels."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class ArmStudy:
    """The parts of one arm in ``folder``, which is made when the first part is kept."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.safetensors"

    def load(self, start: int, count: int, spaces: Sequence[str]) -> Part | None:
        """The part, or None if it is missing or damaged and has to be made."""
        path = self._path(start)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads(_intact(file))
                encoded = {file.get_slice(FEATURES + name).get_shape()[0] for name in spaces}
                pictures = [key for key in file.keys() if key.startswith(PICTURE)]  # noqa: SIM118
            part = Part(
                start,
                Scores.from_dict(content["scores"]),
                float(content["seconds"]),
                int(content["nfe"]),
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); its pictures are made again", path, error)
            return None
        if {len(part), len(pictures), *encoded} != {count}:
            logger.warning("%s does not hold %d pictures; they are made again", path, count)
            return None
        return part

    def keep(self, part: Part, features: Mapping[str, torch.Tensor], images: torch.Tensor) -> None:
        """Write the part with its features [n, dim] by space and its pictures [n, height, width, 3].

        On return it is on the disk; EvaluationError where the disk refuses.
        """
        tensors = {FEATURES + name: value.contiguous() for name, value in features.items()}
        for index, picture in enumerate(as_bytes(images)):
            tensors[f"{PICTURE}{part.start + index:06d}"] = _png(picture)
        content = {
            "scores": part.scores.to_dict(),
            "seconds": part.seconds,
            "nfe": part.nfe,
        }
        data = _sealed(tensors, json.dumps(content))
        try:
            write_atomic(self._path(part.start), data)
        except OSError as error:
            raise EvaluationError(
                f"{disk_error(error, self._path(part.start), len(data))}; run the same again then: "
                "finished parts are kept"
            ) from None

    def features(self, part: Part, space: str) -> torch.Tensor:
        """Features [n, dim] of the part's pictures."""
        with safe_open(self._path(part.start), framework="pt") as file:
            return file.get_tensor(FEATURES + space)

    def pictures(self, part: Part, indices: range) -> torch.Tensor:
        """uint8 pictures [n, height, width, 3] of the prompts ``indices``, which ``part`` holds."""
        with safe_open(self._path(part.start), framework="pt") as file:
            return torch.stack([_decoded(file.get_tensor(f"{PICTURE}{i:06d}")) for i in indices])


def _digest(tensors: Mapping[str, torch.Tensor], content: str) -> str:
    found = hashlib.sha256(content.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _sealed(tensors: Mapping[str, torch.Tensor], content: str) -> bytes:
    from safetensors.numpy import save  # ComfyUI has not imported it at start

    # As numpy arrays: safetensors.torch's save makes a ctypes type for each new number of bytes, which
    # Python never frees, and every picture has another number.
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return save(arrays, {CONTENT: content, SUM: _digest(tensors, content)})


def _intact(file) -> str:
    """What a file says of its tensors; ValueError if anything in it is not as it was written."""
    found = file.metadata() or {}
    content = found.get(CONTENT, "")
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if found.get(SUM) != _digest(tensors, content):
        raise ValueError("its checksum differs")
    return content


def _png(picture: torch.Tensor) -> torch.Tensor:
    buffer = BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "PNG", compress_level=1)
    return torch.from_numpy(np.frombuffer(buffer.getvalue(), np.uint8).copy())


def _decoded(data: torch.Tensor) -> torch.Tensor:
    with Image.open(BytesIO(data.numpy().tobytes())) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())


def kept_features(path: Path) -> torch.Tensor | None:
    """Features that :func:`keep_features` wrote; None where they have to be made."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            _intact(file)
            return file.get_tensor("features")
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged or of an earlier version (%s); it is made again", path, error)
        return None


def keep_features(path: Path, features: torch.Tensor) -> None:
    write_atomic(path, _sealed({"features": features.contiguous()}, ""))
