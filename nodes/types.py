"""Socket types of this pack."""

from __future__ import annotations

from comfy_api.latest import io

Schedule = io.Custom("QSCHED_SCHEDULE")
Objective = io.Custom("QSCHED_OBJECTIVE")
Prompts = io.Custom("QSCHED_PROMPTS")
