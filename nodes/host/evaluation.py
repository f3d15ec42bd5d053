"""An evaluation's arms inside ComfyUI (0.30.0)."""

from __future__ import annotations

from pathlib import Path

import comfyui_version

from ...qsched_core.evaluation import Arm
from ...qsched_core.evaluation.run import source_hash
from ...qsched_core.trajectory import Candidate
from .source import ComfySource
from .weights.provenance import UNQUANTIZED

NODES = Path(__file__).resolve().parents[1]
BASELINE, QUANTIZED, SCHEDULE = "baseline", "quantized", "schedule"


def model_arms(source: ComfySource, scheduled: Candidate | None, base: bool) -> list[Arm]:
    """Arms of the model: alone (if ``base``, or without a schedule), and with the schedule."""
    form = source.describe()["model"]["format"]
    unquantized = form == UNQUANTIZED
    identity, arms = Candidate.identity(source.trajectory), []
    if base or scheduled is None:
        label = "unquantized" if unquantized else f"quantized ({form})"
        arms.append(Arm(QUANTIZED, source, identity, label, made_by()))
    if scheduled is not None:
        label = f"{'unquantized' if unquantized else form} + schedule"
        arms.append(Arm(SCHEDULE, source, scheduled, label, made_by()))
    return arms


def reference_arm(reference: ComfySource) -> Arm:
    """The arm of the unquantized model, without a schedule."""
    return Arm(BASELINE, reference, Candidate.identity(reference.trajectory), "", made_by())


def made_by() -> dict[str, str]:
    """The versions of the code that makes the pictures."""
    return {"comfyui": comfyui_version.__version__, "nodes": source_hash(NODES)}
