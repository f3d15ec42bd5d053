"""PickScore (Kirstain et al., arXiv 2305.01569): a CLIP-H tuned on Pick-a-Pic's choices.

Its weights are published as a transformers CLIPModel.
"""

from __future__ import annotations

from ..optional import missing
from .base import ScorerEntry, Sources
from .open_clip import FEATURE, INSTALL
from .preference import Preference
from .weights import encoder_of, from_huggingface, read_weights

LICENCE = "weights: MIT"
NAME, FILE = "pickscore", "PickScore_v1/model.safetensors"


def _build(option: str, sources: Sources) -> Preference:
    """The score as published: exp(logit_scale) times the cosine, about 16 to 24."""
    path = sources.file(NAME, f"for example {FILE}")
    weights = read_weights(path)
    if any(name.startswith("vision_model.") for name in weights):
        weights = from_huggingface(weights, path.name)
    encoder = encoder_of(weights, sources.describe_file(path), path.name, sources.place)
    return Preference(NAME, encoder, encoder.logit_scale)


ENTRY = ScorerEntry(
    name=NAME,
    measures="quality",
    licence=LICENCE,
    available=lambda: missing("open_clip", FEATURE, INSTALL),
    build=_build,
    needs_file=True,
)
