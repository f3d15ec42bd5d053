"""The feature spaces that can be used here."""

from __future__ import annotations

from ..scorers import DualEncoder, Placement, ScorerError, stay
from .base import FeatureSpace
from .inception import inception_space


def encoder_space(encoder: DualEncoder) -> FeatureSpace:
    """The unit-length image features of an open_clip encoder."""
    return FeatureSpace(
        "open_clip",
        encoder.encode_images,
        {"features": "open_clip", "encoder": encoder.describe()},
    )


def usable_spaces(
    encoder: DualEncoder | None, place: Placement = stay
) -> tuple[list[FeatureSpace], list[str]]:
    """The encoder's features, and Inception's where their weights are; and why others are left out."""
    spaces, notes = [], []
    if encoder is None:
        notes.append(
            "the objective has no open_clip encoder, so there is no distance in its features"
        )
    else:
        spaces.append(encoder_space(encoder))
    try:
        spaces.append(inception_space(place=place))
    except ScorerError as error:
        notes.append(str(error))
    return spaces, notes
