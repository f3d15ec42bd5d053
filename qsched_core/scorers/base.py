"""What a scorer is, and what all of them share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import plainly_named

if TYPE_CHECKING:
    from .open_clip import DualEncoder

logger = logging.getLogger(__name__)

CLIP_SCALE, CLIP_SCORE_FLOOR = 100.0, 1.0

# Moves a module to the device it should run on, and gives that device.
Placement = Callable[[torch.nn.Module], torch.device]


@plainly_named
class ScorerError(ValueError):
    """A scorer that can't be built, or whose output is no score."""


def agree_to_download(allowed: bool, what: str) -> None:
    """Asked before anything is fetched: ScorerError, which names ``what``, unless it is allowed."""
    if not allowed:
        raise ScorerError(
            f"{what} would be downloaded from the internet; set allow_download to agree, or put "
            "weights that need no download into models/clip_score and choose them"
        )


def stay(module: torch.nn.Module) -> torch.device:
    """The placement that moves nothing."""
    return next(module.parameters()).device


@dataclass(frozen=True)
class Sources:
    """What scorers are made of: the encoder they share, and weight files by scorer name.

    ``place`` brings a model to its device before use; ``allow_download`` is the user's consent.
    """

    encoder: DualEncoder
    place: Placement = stay
    files: Mapping[str, Path] = field(default_factory=dict)
    allow_download: bool = False

    def file(self, name: str, example: str) -> Path:
        """The file of the scorer ``name``; ScorerError where none was chosen or it is not there."""
        path = self.files.get(name)
        if path is None:
            raise ScorerError(
                f"scorer {name!r} needs its weights, {example}: put the file into models/clip_score "
                f"and choose it as {name}_name"
            )
        if not Path(path).is_file():
            raise ScorerError(f"{name}_name: {path} does not exist")
        return Path(path)

    @staticmethod
    def describe_file(path: Path) -> dict[str, str]:
        """The file's name and SHA-256, for provenance."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return {"file": path.name, "sha256": digest.hexdigest()}


def in_parts(
    items: torch.Tensor, size: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``function`` of ``items`` [n, ...], ``size`` at a time, halved when memory runs out."""
    out, start = [], 0
    while start < len(items):
        try:
            out.append(function(items[start : start + size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            logger.warning("a scorer ran out of memory; continuing with %d images at a time", size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += size
    return torch.cat(out)


@dataclass(frozen=True)
class Batch:
    """Images [n, height, width, 3] in [0, 1] with a prompt each; features are encoded once."""

    images: torch.Tensor
    prompts: tuple[str, ...]
    encoder: DualEncoder

    @cached_property
    def image_features(self) -> torch.Tensor:
        return self.encoder.encode_images(self.images)


class Scorer(Protocol):
    """Gives every image of a batch a number, higher is better."""

    name: str

    def score(self, batch: Batch) -> torch.Tensor:
        """Scores [n], on the CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON that fixes what is measured."""
        ...


@dataclass(frozen=True)
class ScorerEntry:
    """A registry entry.  ``build(option, sources)`` makes the scorer.

    ``option`` is what follows the colon in ``name:option``, or empty; ``option_hint`` says what may
    stand there.  ``needs_file`` is for one with weights of its own.
    """

    name: str
    measures: str  # "alignment" or "quality"
    licence: str
    available: Callable[[], str | None]
    build: Callable[[str, Sources], Scorer]
    option_hint: str = ""
    needs_file: bool = False


def check_images(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """ScorerError unless images are [n, height, width, 3] finite numbers and prompts n texts."""
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ScorerError(
            f"images have shape {list(images.shape)}; [n, height, width, 3] with n of at least 1 "
            "is needed"
        )
    if len(prompts) != len(images):
        raise ScorerError(f"{len(images)} images but {len(prompts)} prompts; give one an image")
    if not torch.isfinite(images).all():
        bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
        raise ScorerError(
            f"image {bad[0] + 1} of {len(images)} (prompt {prompts[bad[0]]!r}) has NaN or infinite "
            "pixels; try another weight format, or run the VAE in fp32"
        )
