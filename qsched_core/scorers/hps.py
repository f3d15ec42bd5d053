"""HPS v2.1, the Human Preference Score (Wu et al., arXiv 2306.09341): open_clip's ViT-H-14, tuned."""

from __future__ import annotations

from ..optional import missing
from .base import ScorerEntry, Sources
from .open_clip import FEATURE, INSTALL
from .preference import Preference
from .weights import encoder_of, read_weights

LICENCE = "code and weights: Apache-2.0"
NAME, FILE = "hps", "HPS_v2.1_compressed.pt"


def _build(option: str, sources: Sources) -> Preference:
    """The score as published: the cosine, about .2 to .35 (tables give it times 100)."""
    path = sources.file(NAME, f"for example {FILE}")
    source = sources.describe_file(path)
    return Preference(NAME, encoder_of(read_weights(path), source, path.name, sources.place), 1.0)


ENTRY = ScorerEntry(
    name=NAME,
    measures="quality",
    licence=LICENCE,
    available=lambda: missing("open_clip", FEATURE, INSTALL),
    build=_build,
    needs_file=True,
)
