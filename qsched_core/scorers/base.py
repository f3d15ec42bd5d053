"""What a scorer is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from .open_clip import DualEncoder

# Brings a module to where it should run and says where that is.
Placement = Callable[[torch.nn.Module], torch.device]


class ScorerError(ValueError):
    """A scorer that can't be built, or that gave something that is no score."""


def stay(module: torch.nn.Module) -> torch.device:
    """The placement that moves nothing."""
    return next(module.parameters()).device


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
    """A registry entry.  ``build(option, encoder, place)`` makes the scorer.

    ``option`` is what follows the colon in ``name:option``, or empty; ``option_hint`` says what may
    stand there.
    """

    name: str
    measures: str  # "alignment" or "quality"
    licence: str
    available: Callable[[], str | None]
    build: Callable[[str, DualEncoder, Placement], Scorer]
    option_hint: str = ""


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
