"""Sharing nodes: a schedule as text that a workflow carries, and as a picture."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..qsched_core.schedule import QSchedule, ScheduleError, chart, summary
from ..qsched_core.text import json_for_page
from .host.pictures import as_tensor
from .host.progress import on_node, progress_text
from .types import Schedule
from .wired import text_only, wired


class QSchedScheduleFromText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedScheduleFromText",
            display_name="Q-Sched Schedule from Text",
            category="QSched/schedules",
            description=(
                "A schedule from its JSON, so that a shared workflow, or a picture made with it, "
                "carries its coefficients. Show Schedule gives the text of any schedule."
            ),
            search_aliases=["paste schedule", "json", "share schedule", "import"],
            inputs=[
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    placeholder="the JSON of a schedule",
                    # The page would take JSON's braces for alternatives to choose from.
                    dynamic_prompts=False,
                    tooltip="Paste the text of Show Schedule or of a file in models/qsched, or connect one.",
                )
            ],
            outputs=[
                Schedule.Output(
                    display_name="schedule",
                    tooltip="For the samplers of this pack and Show Schedule.",
                )
            ],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, text=None):
        if text is None:  # wired: checked when it runs
            return True
        try:
            _parse(text)
        except ScheduleError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        schedule = _parse(text)
        return io.NodeOutput(schedule, ui=on_node(schedule.describe()))


def _parse(text: str) -> QSchedule:
    try:
        return QSchedule.from_json(text)
    except ScheduleError as error:
        raise ScheduleError(f"text: {error}; copy the whole text of Show Schedule") from None


class QSchedShowSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedShowSchedule",
            display_name="Show Schedule",
            category="QSched/schedules",
            description=(
                "Draws a schedule: coefficients and noise levels, every number, and what it was "
                "learned for. Its text can be pasted into Q-Sched Schedule from Text."
            ),
            search_aliases=["preview schedule", "plot", "curve", "inspect", "graph"],
            inputs=[Schedule.Input("schedule", tooltip="What to draw.")],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Curves and numbers, drawn."),
                io.String.Output(display_name="text", tooltip="The JSON of the schedule."),
                io.String.Output(
                    display_name="summary", tooltip="The numbers and the origin, to be read."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @wired("schedule")
    def execute(cls, schedule) -> io.NodeOutput:
        image, text = as_tensor(chart.draw(schedule)), schedule.to_json()
        told = summary.summary(schedule)
        # First what a person reads, then what is to be copied.
        progress_text(cls.hidden.unique_id, f"{told}\n\n{json_for_page(text)}")
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": (text,)}
        return io.NodeOutput(image, text, told, ui=shown)


NODES = (QSchedScheduleFromText, QSchedShowSchedule)
