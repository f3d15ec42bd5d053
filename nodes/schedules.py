"""Schedule nodes: make, load, save and edit the coefficients, and their noise levels."""

from __future__ import annotations

import hashlib
from itertools import count
from pathlib import Path

from comfy_api.latest import io

from ..qsched_core.correction import DEFAULT, Parameter
from ..qsched_core.schedule import (
    EDITS,
    MAX_STEPS,
    QSchedule,
    ScheduleError,
)
from ..qsched_core.schedule.naming import AUTOMATIC, file_name, is_automatic, same_subject
from ..qsched_core.solvers import SOLVERS
from ..qsched_core.text import shown
from ..qsched_core.trajectory import Trajectory
from .choices import Choice, own_inputs, with_choices
from .host.folders import new_schedule_path, schedule_files, schedule_path
from .host.progress import on_node
from .host.trajectories import SCHEDULERS, sigmas_and_flow, sigmas_of
from .inputs import collected
from .types import Schedule
from .wired import text_only, wired

PARAMETERS = DEFAULT.parameters
OUT = "For the samplers of this pack, Show Schedule and Save Q-Sched Schedule."
with_changes = collected("changes", [parameter.name for parameter in PARAMETERS])
STEP = Choice(
    "step",
    word="all steps",
    meant=0,
    start=1,
    least=1,
    most=MAX_STEPS,
    asks="one step",
    number_first=True,
    tooltip="What is changed: one step, where 1 is the first, or all of them.",
)
STEPS = Choice(
    "steps",
    word="as the schedule",
    meant=0,
    start=4,
    least=1,
    most=MAX_STEPS,
    tooltip="Used with a model: as many as the schedule has, or a number.",
)


def _widget(parameter: Parameter, end: str) -> str:
    """The name of a ramp's widget: the parameter without its "c_", then ``end``."""
    return f"{parameter.name.removeprefix('c_')}_{end}"


def _ramp_inputs() -> list:
    """Start and end of every parameter."""
    texts = {"start": "{0} of the first step: {1}.", "end": "{0} of the last step."}
    return [
        io.Float.Input(
            _widget(p, end),
            default=p.neutral,
            min=p.low,
            max=p.high,
            step=0.001,
            tooltip=text.format(p.name, p.summary),
        )
        for p in PARAMETERS
        for end, text in texts.items()
    ]


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
            search_aliases=["ramp", "coefficients", "manual schedule", "by hand"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Gives the noise levels the coefficients belong to."
                ),
                io.Combo.Input("solver", options=list(SOLVERS), tooltip="The solver to correct."),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="simple",
                    tooltip="The noise levels, as in KSampler.",
                ),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps."),
                *_ramp_inputs(),
            ],
            outputs=[Schedule.Output(display_name="schedule", tooltip=OUT)],
        )

    @classmethod
    @wired("model")
    def execute(cls, model, solver, scheduler, steps, **ends) -> io.NodeOutput:
        sigmas, flow = sigmas_and_flow(model, scheduler, steps)
        trajectory = Trajectory.of(sigmas.tolist(), solver, flow)
        ramps = {p.name: (ends[_widget(p, "start")], ends[_widget(p, "end")]) for p in PARAMETERS}
        schedule = QSchedule(trajectory, DEFAULT.ramp(ramps, trajectory.steps), {"source": "ramp"})
        return io.NodeOutput(schedule, ui=on_node(schedule.describe()))


class QSchedLoadSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadSchedule",
            display_name="Load Q-Sched Schedule",
            category="QSched/schedules",
            search_aliases=["load coefficients", "load calibration", "open schedule", "qsched"],
            description="Read learned coefficients from models/qsched.",
            inputs=[
                io.Combo.Input(
                    "schedule_name",
                    options=schedule_files(),
                    tooltip="A file in models/qsched.",
                )
            ],
            outputs=[Schedule.Output(display_name="schedule", tooltip=OUT)],
        )

    @classmethod
    def fingerprint_inputs(cls, schedule_name):
        return hashlib.sha256(schedule_path(schedule_name).read_bytes()).hexdigest()

    @classmethod
    @text_only
    def validate_inputs(cls, schedule_name=None):
        if schedule_name is None:  # wired: checked when it runs
            return True
        try:
            QSchedule.load(schedule_path(schedule_name))
        except (ValueError, OSError) as error:
            return f"schedule_name={shown(schedule_name)}: {error}"
        return True

    @classmethod
    def execute(cls, schedule_name) -> io.NodeOutput:
        schedule = QSchedule.load(schedule_path(schedule_name))
        return io.NodeOutput(schedule, ui=on_node(schedule.describe()))


class QSchedSaveSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSaveSchedule",
            display_name="Save Q-Sched Schedule",
            category="QSched/schedules",
            search_aliases=["save coefficients", "save calibration", "export schedule", "qsched"],
            description="Write coefficients to models/qsched as a small JSON file.",
            inputs=[
                Schedule.Input("schedule", tooltip="What to write."),
                io.String.Input(
                    "name",
                    default=AUTOMATIC,
                    tooltip="File name; a subfolder may be part of it. {model}, {format}, {solver} "
                    "and {steps} are filled in; with them another's file is never replaced: the name "
                    "gets a number.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace a file of that name.",
                ),
            ],
            outputs=[Schedule.Output(display_name="schedule", tooltip=OUT)],
            is_output_node=True,
        )

    @classmethod
    @text_only
    def validate_inputs(cls, name=None):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        if name is None:  # wired: checked when it runs
            return True
        try:
            new_schedule_path(file_name(name))
        except ScheduleError as error:
            return str(error)
        return True

    @classmethod
    @wired("schedule")
    def execute(cls, schedule, name, overwrite=False) -> io.NodeOutput:
        path = _saved(schedule, name, overwrite)
        return io.NodeOutput(schedule, ui=on_node(f"saved to {path}\n{schedule.describe()}"))


def _saved(schedule: QSchedule, name: str, overwrite: bool) -> Path:
    """Write the file; its path.

    A name that is filled in gets a number where another schedule has it; ``overwrite`` then replaces
    a schedule of the same model, format and trajectory alone.
    """
    base, automatic = file_name(name, schedule), is_automatic(name)
    for number in count(1):
        path = new_schedule_path(base if number == 1 else f"{base}-{number}")
        try:
            schedule.save(path, overwrite and not automatic)
            return path
        except FileExistsError:
            if not automatic:
                raise ScheduleError(_exists(name, path)) from None
        there = _read(path)
        if there == schedule:
            return path
        if overwrite and there is not None and same_subject(there, schedule):
            schedule.save(path)
            return path
    raise AssertionError("unreachable")


def _read(path: Path) -> QSchedule | None:
    try:
        return QSchedule.load(path)
    except (ScheduleError, OSError):
        return None


def _exists(name: str, path: Path) -> str:
    return f"name={shown(name)}: {path} exists; choose another name, or set overwrite"


class QSchedEditSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedEditSchedule",
            display_name="Edit Schedule",
            category="QSched/schedules",
            description=(
                "Nudge the coefficients of one step, or of all. The result says that it was edited: "
                "scores that were measured are the original's."
            ),
            search_aliases=["nudge", "tweak schedule", "change coefficients"],
            inputs=[
                Schedule.Input("schedule", tooltip="What to change."),
                STEP.input(optional=False, advanced=False),
                io.Combo.Input(
                    "mode", options=list(EDITS), tooltip="What is done with the two numbers below."
                ),
                *(_change_input(parameter) for parameter in PARAMETERS),
            ],
            outputs=[Schedule.Output(display_name="schedule", tooltip=OUT)],
            accept_all_inputs=True,
        )

    @classmethod
    @with_choices(STEP)
    @with_changes
    @wired("schedule")
    def execute(cls, schedule, mode, changes, step=None) -> io.NodeOutput:
        edited = schedule.edited({n: by or None for n, by in changes.items()}, step or 0, mode)
        return io.NodeOutput(edited, ui=on_node(edited.describe()))


def _change_input(parameter: Parameter):
    name = parameter.name
    return io.Float.Input(
        name,
        default=0.0,
        min=-parameter.high,
        max=parameter.high,
        step=0.001,
        round=False,
        tooltip=f"0 leaves {name} as it is; another number is added to it, multiplies it or takes its "
        "place.",
    )


class QSchedSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSigmas",
            display_name="Q-Sched Sigmas",
            category="QSched/schedules",
            description=(
                "Noise levels for SamplerCustom and SamplerCustomAdvanced: the schedule's own, or, "
                "with a model, those of any scheduler."
            ),
            search_aliases=["sigmas", "noise levels", "basic scheduler", "timesteps"],
            inputs=[
                Schedule.Input(
                    "schedule",
                    optional=True,
                    tooltip="Its own noise levels, unless a model is given.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="Then the scheduler gives the noise levels."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="simple",
                    optional=True,
                    tooltip="Used with a model.",
                ),
                STEPS.input(advanced=False),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "Below 1 the trajectory is entered in its middle. With a model as in "
                        "BasicScheduler; else the schedule's last steps x denoise steps are given."
                    ),
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="Noise levels, from the largest to 0.")],
            accept_all_inputs=True,
        )

    @classmethod
    @own_inputs
    def validate_inputs(cls, denoise=None):
        if denoise is None or 0 < denoise <= 1:
            return True
        return f"denoise={denoise} must be above 0 and at most 1; 1 denoises fully"

    @classmethod
    @with_choices(STEPS)
    @wired("model", "schedule")
    def execute(
        cls, schedule=None, model=None, scheduler="simple", steps=None, denoise=1.0
    ) -> io.NodeOutput:
        sigmas = sigmas_of(schedule, model, scheduler, steps, denoise)
        return io.NodeOutput(sigmas, ui=on_node(", ".join(f"{s:.4g}" for s in sigmas.tolist())))


NODES = (
    QSchedRamp,
    QSchedLoadSchedule,
    QSchedSaveSchedule,
    QSchedEditSchedule,
    QSchedSigmas,
)
