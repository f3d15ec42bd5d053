"""Socket types of this pack, and what its inputs share."""

from __future__ import annotations

from comfy_api.latest import io

Schedule = io.Custom("QSCHED_SCHEDULE")
Objective = io.Custom("QSCHED_OBJECTIVE")
Prompts = io.Custom("QSCHED_PROMPTS")

MAX_SEED = 2**53 - 1  # what a browser's number keeps exactly
