"""Prompt nodes: what to search on, and what to judge by."""

from __future__ import annotations

from comfy_api.latest import io

from ..qsched_core.prompts import CalibrationPrompts, PromptError, bundled_prompts, parse_prompts
from .types import MAX_SEED, Prompts

SOURCES = ("bundled", "text")


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
            inputs=[
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    tooltip="bundled: 20 + 64 general prompts. text: your own, below.",
                ),
                io.String.Input(
                    "calibration",
                    default="",
                    multiline=True,
                    tooltip=f"{text_tooltip} About 20 are usual.",
                ),
                io.String.Input(
                    "heldout",
                    default="",
                    multiline=True,
                    tooltip=f"{text_tooltip} 32 or more tell small gains from chance.",
                ),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED),
            ],
            outputs=[Prompts.Output(display_name="prompts")],
        )

    @classmethod
    def validate_inputs(cls, source, calibration, heldout):
        if None in (source, calibration, heldout):  # wired: checked when it runs
            return True
        try:
            _prompts(source, calibration, heldout, 0)
        except PromptError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, source, calibration, heldout, seed) -> io.NodeOutput:
        return io.NodeOutput(_prompts(source, calibration, heldout, seed))


def _prompts(source: str, calibration: str, heldout: str, seed: int) -> CalibrationPrompts:
    if source not in SOURCES:
        raise PromptError(f"source={source!r} is unknown; choose one of {', '.join(SOURCES)}")
    if source == "bundled":
        return bundled_prompts(seed)
    return CalibrationPrompts.of(
        parse_prompts(calibration, "calibration"), parse_prompts(heldout, "heldout"), seed
    )


NODES = (QSchedCalibrationPrompts,)
