"""Aesthetic predictors on CLIP features: LAION's linear one, and the improved predictor's layers.

github.com/LAION-AI/aesthetic-predictor (``weight``, ``bias``) and
github.com/christophschuhmann/improved-aesthetic-predictor (``layers.N``, linear maps without an
activation between them).  Both read the unit-length image features of OpenAI's CLIP ViT-L/14 and
give about 1 to 10.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Batch, ScorerEntry, ScorerError, Sources
from .weights import Weights, read_weights

LICENCE = "LAION's weights: MIT; the improved predictor's: Apache-2.0"
NAME = "aesthetic"


def layers_of(weights: Weights, file: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight [out, in] and bias [out] of each linear map, first to last.

    ScorerError where the keys or shapes are no predictor's.
    """
    stems = sorted(
        {name.rpartition(".")[0] for name in weights},
        key=lambda stem: int(stem.rpartition(".")[2]) if stem.rpartition(".")[2].isdigit() else -1,
    )
    layers = []
    for stem in stems:
        prefix = f"{stem}." if stem else ""
        weight, bias = weights.get(f"{prefix}weight"), weights.get(f"{prefix}bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ScorerError(f"{file}: {prefix or 'its keys'} is no linear layer of a predictor")
        if layers and layers[-1][0].shape[0] != weight.shape[1]:
            raise ScorerError(f"{file}: {stem} does not follow the layer before it")
        layers.append((weight.float(), bias.float()))
    if not layers or layers[-1][0].shape[0] != 1:
        raise ScorerError(f"{file} is no aesthetic predictor: its last layer must give one number")
    return layers


class Aesthetic:
    """The predictor's score [n] of the encoder's image features."""

    name = NAME

    def __init__(self, layers, source: dict[str, Any], encoder):
        self.layers, self.source, self.encoder = layers, source, encoder

    def score(self, batch: Batch) -> torch.Tensor:
        x, width = batch.image_features, self.layers[0][0].shape[1]
        if x.shape[1] != width:
            raise ScorerError(
                f"{self.source['file']} reads features {width} wide and the encoder gives "
                f"{x.shape[1]}; use the encoder it was made for (OpenAI's ViT-L/14 gives 768)"
            )
        for weight, bias in self.layers:
            x = x @ weight.T + bias
        return x[:, 0]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.source, "encoder": self.encoder.describe()}


def _build(option: str, sources: Sources) -> Aesthetic:
    path = sources.file(NAME, "for example sa_0_4_vit_l_14_linear.pth")
    layers = layers_of(read_weights(path), path.name)
    return Aesthetic(layers, sources.describe_file(path), sources.encoder)


ENTRY = ScorerEntry(
    name=NAME,
    measures="quality",
    licence=LICENCE,
    available=lambda: None,
    build=_build,
    needs_file=True,
)
