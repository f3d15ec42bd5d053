"""Prompt nodes: what to search on, and what to judge by."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..qsched_core.prompts import (
    CalibrationPrompts,
    PromptError,
    bundled_lists,
    categories,
    parse_prompts,
    read_prompts,
)
from ..qsched_core.text import shown
from .host.folders import input_file, prompt_set, prompt_sets
from .host.progress import on_node
from .types import MAX_SEED, Prompts

ONE = "bundled: "  # of one category, its name after it
OWN = "set: "  # a file of the user's, its name after it
SOURCES = ("bundled", "text", "file", *(f"{ONE}{name}" for name in categories()))
LABELS = {
    "calibration": "# calibration: searched on, one prompt a line",
    "heldout": "# held-out: judged by, never searched on, one prompt a line",
}
MAX_CATEGORIES = 2048  # characters


class QSchedCalibrationPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        text_tooltip = "One prompt a line; lines with # are comments. Used when source is text."
        return io.Schema(
            node_id="QSchedCalibrationPrompts",
            display_name="Calibration Prompts",
            category="QSched/calibration",
            description=(
                "Prompts to search on, and others, never searched on, to judge the result by. Every "
                "prompt gets a seed of its own, derived from the one given."
            ),
            search_aliases=["prompts", "prompt list", "calibration set", "text file", "held-out"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[*SOURCES, *(f"{OWN}{name}" for name in prompt_sets())],
                    tooltip="bundled: 20 + 64 general prompts, or those of one kind. text: your own, "
                    "below. file: your own, in ComfyUI's input folder. set: your own, a file in "
                    "models/qsched_prompts.",
                ),
                io.String.Input(
                    "calibration",
                    default=LABELS["calibration"],
                    multiline=True,
                    placeholder=LABELS["calibration"],
                    tooltip=f"{text_tooltip} About 20 are usual.",
                ),
                io.String.Input(
                    "heldout",
                    default=LABELS["heldout"],
                    multiline=True,
                    placeholder=LABELS["heldout"],
                    tooltip=f"{text_tooltip} 32 or more tell small gains from chance.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the pictures. With another one everything is learned anew.",
                ),
                io.String.Input(
                    "categories",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Of the bundled prompts, separated by commas; all if empty: "
                    f"{', '.join(categories())}.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="In the input folder, when source is file: JSON with the lists "
                    "calibration and heldout, or text with one prompt a line and a line [heldout] "
                    "between them.",
                ),
            ],
            outputs=[
                Prompts.Output(
                    display_name="prompts", tooltip="For JAQ Calibrator and JAQ Evaluate."
                )
            ],
            is_input_list=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source, file="", **inputs):
        source, path = _one(source), None
        if source == "file":
            path = input_file(_one(file))
        elif source and source.startswith(OWN):
            path = prompt_set(source.removeprefix(OWN))
        if path is None:
            return source
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    @classmethod
    def execute(cls, source, calibration, heldout, seed, categories="", file="") -> io.NodeOutput:
        values = [_one(value) for value in (source, calibration, heldout, categories, file, seed)]
        found = _prompts(*values)
        text = f"{len(found.calibration)} prompts to search on, {len(found.heldout)} to judge by"
        return io.NodeOutput(found, ui=on_node(text))


def _one(value):
    """The only value of a list input (None while it is wired); several texts as a JSON list."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == 1 else json.dumps(value)


def _prompts(
    source: str, calibration: str, heldout: str, chosen: str, file: str, seed: int
) -> CalibrationPrompts:
    return CalibrationPrompts.of(*_lists(source, calibration, heldout, chosen, file), seed)


def _lists(source: str, calibration: str, heldout: str, chosen: str, file: str):
    """Calibration and held-out prompts."""
    if source.startswith(OWN):
        return read_prompts(prompt_set(source.removeprefix(OWN)))
    if source not in SOURCES:
        raise PromptError(f"source={shown(source)} is unknown; choose one of {', '.join(SOURCES)}")
    if source == "bundled":
        return bundled_lists(_categories(chosen))
    if source.startswith(ONE):
        return bundled_lists([source.removeprefix(ONE)])
    if source == "file":
        return read_prompts(input_file(file))
    return parse_prompts(calibration, "calibration"), parse_prompts(heldout, "heldout")


def _categories(chosen: str) -> list[str]:
    if len(chosen) > MAX_CATEGORIES:
        raise PromptError(
            f"categories={shown(chosen)} has {len(chosen)} characters; choose from "
            f"{', '.join(categories())}"
        )
    return [name.strip() for name in chosen.split(",") if name.strip()]


NODES = (QSchedCalibrationPrompts,)
