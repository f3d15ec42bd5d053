"""Schedule nodes: make, load and save the coefficients."""

from __future__ import annotations

import hashlib

from comfy_api.latest import io, ui

from ..qsched_core.schedule import MAX_COEFFICIENT, MIN_COEFFICIENT, QSchedule
from ..qsched_core.solvers import SOLVERS
from . import host
from .types import Schedule


def _coefficient_input(name: str, tooltip: str):
    return io.Float.Input(
        name, default=1.0, min=MIN_COEFFICIENT, max=MAX_COEFFICIENT, step=0.001, tooltip=tooltip
    )


class QSchedRamp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedRamp",
            display_name="Q-Sched Schedule",
            category="QSched/schedules",
            description=(
                "Coefficients by hand: each runs linearly from its start value at the first step to "
                "its end value at the last (the ramp of arXiv 2509.01624). All at 1 is the base solver."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="Gives the noise levels the coefficients belong to."
                ),
                io.Combo.Input("solver", options=list(SOLVERS)),
                io.Combo.Input("scheduler", options=list(host.SCHEDULERS), default="simple"),
                io.Int.Input("steps", default=4, min=1, max=1000),
                _coefficient_input("x_start", "c_x of the first step: scales the noisy latent."),
                _coefficient_input("x_end", "c_x of the last step."),
                _coefficient_input(
                    "eps_start", "c_eps of the first step: scales the model's output."
                ),
                _coefficient_input("eps_end", "c_eps of the last step."),
            ],
            outputs=[Schedule.Output(display_name="schedule")],
        )

    @classmethod
    def execute(
        cls, model, solver, scheduler, steps, x_start, x_end, eps_start, eps_end
    ) -> io.NodeOutput:
        sigmas, flow = host.sampling_facts(model, scheduler, steps)
        schedule = QSchedule.ramp(
            sigmas.tolist(), (x_start, x_end), (eps_start, eps_end), solver, flow, source="ramp"
        )
        return io.NodeOutput(schedule, ui=ui.PreviewText(schedule.describe()))


class QSchedLoadSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadSchedule",
            display_name="Load Q-Sched Schedule",
            category="QSched/schedules",
            description="Read learned coefficients from models/qsched.",
            inputs=[
                io.Combo.Input(
                    "schedule_name",
                    options=host.schedule_files(),
                    tooltip="A file in models/qsched.",
                )
            ],
            outputs=[Schedule.Output(display_name="schedule")],
        )

    @classmethod
    def fingerprint_inputs(cls, schedule_name):
        return hashlib.sha256(host.schedule_path(schedule_name).read_bytes()).hexdigest()

    @classmethod
    def validate_inputs(cls, schedule_name):
        try:
            QSchedule.load(host.schedule_path(schedule_name))
        except (ValueError, OSError) as error:
            return f"schedule_name={schedule_name!r}: {error}"
        return True

    @classmethod
    def execute(cls, schedule_name) -> io.NodeOutput:
        schedule = QSchedule.load(host.schedule_path(schedule_name))
        return io.NodeOutput(schedule, ui=ui.PreviewText(schedule.describe()))


class QSchedSaveSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSaveSchedule",
            display_name="Save Q-Sched Schedule",
            category="QSched/schedules",
            description="Write coefficients to models/qsched as a small JSON file.",
            inputs=[
                Schedule.Input("schedule"),
                io.String.Input(
                    "name", default="schedule", tooltip="File name; a subfolder may be part of it."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace a file of that name.",
                ),
            ],
            outputs=[Schedule.Output(display_name="schedule")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name, overwrite=False):
        try:
            path = host.new_schedule_path(name)
        except ValueError as error:
            return str(error)
        if path.exists() and not overwrite:
            return f"name={name!r}: {path} exists; choose another name, or set overwrite"
        return True

    @classmethod
    def execute(cls, schedule, name, overwrite=False) -> io.NodeOutput:
        path = schedule.save(host.new_schedule_path(name))
        return io.NodeOutput(schedule, ui=ui.PreviewText(f"saved to {path}\n{schedule.describe()}"))


NODES = (QSchedRamp, QSchedLoadSchedule, QSchedSaveSchedule)
