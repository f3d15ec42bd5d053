"""What a calibration learned, kept in the workflow of every picture that is made with it.

ComfyUI (0.30.0) writes the prompt and the page's workflow into a picture when it is saved.  What was
learned is put into the calibrator's widget of both before that, together with a digest of the graph
that it was learned by: dropped into the page, the picture is made again without learning anew, as
long as nothing before the calibrator was changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ...qsched_core.schedule import QSchedule, ScheduleError
from ...qsched_core.validation import plain_json

LEARNED = "learned"  # the widget's name
CALIBRATOR, SAVE = "QSchedJAQCalibrator", "QSchedSaveSchedule"
AFTER = 1  # widgets of the calibrator after that one; a test says so


def digest(prompt: Mapping[str, Any], node_id: str) -> str:
    """A hash of a node and all that feeds it, whatever their ids; without what was learned."""
    known: dict[str, str] = {}

    def of(key: str) -> str:
        if key not in known:
            node, inputs = prompt[key], {}
            for name, value in sorted(node["inputs"].items()):
                if _is_link(value, prompt):
                    inputs[name] = ["link", of(value[0]), value[1]]
                elif name != LEARNED:
                    inputs[name] = value
            text = json.dumps([node["class_type"], inputs], sort_keys=True)
            known[key] = hashlib.sha256(text.encode()).hexdigest()
        return known[key]

    return of(node_id)


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in prompt


def text_of(schedule: QSchedule, prompt: Mapping[str, Any], node_id: str) -> str:
    """What the widget holds."""
    content = {"graph": digest(prompt, node_id), "schedule": json.loads(schedule.to_json())}
    return json.dumps(content)


def recalled(text: str, prompt: Mapping[str, Any] | None, node_id: str | None) -> QSchedule | None:
    """The schedule that the widget holds; None if it is empty, or of another graph than this."""
    if not text or not text.strip() or not prompt or node_id not in prompt:
        return None
    try:
        content = plain_json(LEARNED, json.loads(text))
        if content["graph"] != digest(prompt, node_id):
            return None
        return QSchedule.from_json(json.dumps(content["schedule"]))
    except (ValueError, TypeError, KeyError, RecursionError, ScheduleError):
        return None


def remember(schedule: QSchedule | None, prompt, extra_pnginfo, node_id: str | None) -> None:
    """Put what was learned into the calibrator that ``schedule`` comes from, if there is one.

    ``prompt`` and ``extra_pnginfo`` are the running prompt's, which SaveImage writes into its files;
    ``node_id`` is the sampler's, or the calibrator's own.
    """
    if schedule is None or not prompt or node_id not in prompt:
        return
    source = _calibrator(prompt, node_id)
    if source is None:
        return
    text = text_of(schedule, prompt, source)
    prompt[source]["inputs"][LEARNED] = text
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    for node in workflow.get("nodes", ()) if isinstance(workflow, dict) else ():
        if str(node.get("id")) == source and node.get("type") == CALIBRATOR:
            _write(node, text)


def _calibrator(prompt: Mapping[str, Any], node_id: str) -> str | None:
    """The calibrator whose schedule, as it is, a node takes; saving does not change it."""
    while prompt[node_id]["class_type"] != CALIBRATOR:
        link = prompt[node_id]["inputs"].get("schedule")
        first = prompt[node_id]["class_type"] in (SAVE, "QSchedKSampler", "QSchedKSamplerAdvanced")
        if not first or not _is_link(link, prompt):
            return None
        node_id = link[0]
    return node_id


def _write(node: dict[str, Any], text: str) -> None:
    """Set the widget of a node as the page writes it: values without names, in their order."""
    values = node.get("widgets_values")
    if isinstance(values, list) and len(values) > AFTER and isinstance(values[-1 - AFTER], str):
        values[-1 - AFTER] = text
