"""Dual encoders that a fresh installation may choose by name: what they weigh and whose they are.

All three are LAION's, trained on LAION-2B (OpenCLIP, arXiv 2212.07143); open_clip finds the files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedEncoder:
    """A model of open_clip; ``bytes`` are its file's, four a weight."""

    architecture: str
    weights: str
    bytes: int
    licence: str

    @property
    def name(self) -> str:
        """As open_clip's ``load_named`` takes it."""
        return f"{self.architecture}/{self.weights}"

    @property
    def label(self) -> str:
        """What a user chooses, and a workflow stores."""
        size = f"{self.bytes / 1e9:.1f} GB"
        return f"{self.name} ({size}, {self.licence})"


NAMED = (
    NamedEncoder("ViT-B-32", "laion2b_s34b_b79k", 605_109_252, "MIT"),
    NamedEncoder("ViT-L-14", "laion2b_s32b_b82k", 1_710_466_052, "MIT"),
    NamedEncoder("ViT-H-14", "laion2b_s32b_b79k", 3_944_437_764, "MIT"),
)


def encoder_name(label: str) -> str | None:
    """open_clip's name of the model that a user chose by ``label``; None for anything else."""
    return next((e.name for e in NAMED if e.label == label), None)
