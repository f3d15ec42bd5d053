"""An evaluation's arms inside ComfyUI (0.30.0)."""

from __future__ import annotations

import logging
from pathlib import Path

import comfyui_version

from ...qsched_core.evaluation import Arm
from ...qsched_core.evaluation.run import source_hash
from ...qsched_core.schedule import QSchedule
from ...qsched_core.text import plain
from ...qsched_core.trajectory import Candidate
from .sampling import differences_of
from .source import ComfySource
from .weights.provenance import UNQUANTIZED

logger = logging.getLogger(__name__)
NODES = Path(__file__).resolve().parents[1]
BASELINE, QUANTIZED, SCHEDULE = "baseline", "quantized", "schedule"


def scheduled_on(schedule: QSchedule, source: ComfySource) -> tuple[Candidate | None, str]:
    """What the schedule makes of the source's trajectory; None if that is what it was.

    The note says what else was learned, and is logged.  ScheduleError for a schedule of the other
    kind of model.
    """
    trajectory = source.trajectory
    candidate, note = schedule.over(trajectory)
    if candidate == Candidate.identity(trajectory):
        return None, note
    differences = differences_of(schedule, trajectory.solver, trajectory.options, source.model)
    note = "; ".join(text for text in (differences, note) if text)
    if note:
        logger.warning(plain(note))
    return candidate, note


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
