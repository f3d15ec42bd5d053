"""The quality scorers there are, by the name a user picks."""

from __future__ import annotations

import torch

from .base import DualEncoder, QualityScorer
from .clip_iqa import ClipIQA

QUALITY_CHOICES = ("clip_iqa", "pyiqa:<metric>")


def quality_scorer(
    name: str, encoder: DualEncoder, device: torch.device | str = "cpu"
) -> QualityScorer:
    """The scorer called ``name``: "clip_iqa" or "pyiqa:<metric>".

    ValueError lists the choices; MissingDependency has the command that installs pyiqa.
    """
    if name == "clip_iqa":
        return ClipIQA(encoder)
    if name.startswith("pyiqa:") and name != "pyiqa:":
        from .pyiqa import PyiqaMetric

        return PyiqaMetric(name.removeprefix("pyiqa:"), device)
    raise ValueError(f"quality={name!r} is unknown; choose {' or '.join(QUALITY_CHOICES)}")
