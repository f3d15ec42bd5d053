"""The calibration node: the search for a model's coefficients."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..qsched_core.calibration import calibrate
from ..qsched_core.calibration.report import report_text, verdict_text
from ..qsched_core.correction.scalar import MAX_COEFFICIENT, MIN_COEFFICIENT
from ..qsched_core.optional import MissingDependencyError
from ..qsched_core.schedule import chart, summary
from ..qsched_core.search import PRUNERS, STRATEGIES, CalibrationSettings
from ..qsched_core.search.levels import GRID, MOST_GRID
from ..qsched_core.search.presets import OWN, PRESETS, chosen
from ..qsched_core.search.strategies import PAPER, WIDE
from ..qsched_core.study import Database, StudyPlace, check_shared, workflow_rule
from .choices import Choice, own_inputs, with_choices
from .host.calibration import CalibrationLive, report_of
from .host.folders import studies_folder
from .host.pictures import as_tensor
from .host.progress import on_node
from .host.remember import LEARNED, recalled, remember
from .inputs import (
    negative_input,
    option_inputs,
    source_of,
    trajectory_inputs,
    with_options,
)
from .types import MAX_SEED, Schedule
from .wired import text_only, wired

SEARCH_OWN = "search's own"
BUDGET = Choice(
    "budget", SEARCH_OWN, meant=0, start=24, least=1, most=100000,
    tooltip="Candidates to try: a number, or the search's own "
    f"({', '.join(f'{s.name} {s.default_budget}' for s in STRATEGIES.values())}).",
)  # fmt: skip
LOW, HIGH = (
    Choice(
        name, SEARCH_OWN, meant=0.0, start=PAPER[place], least=least, most=most, step=0.05,
        tooltip=f"{what} value of the ramps: a number, or the search's own "
        f"({WIDE[place]}; of grid {PAPER[place]}).",
    )
    for place, (name, what, least, most) in enumerate(
        (("low", "Least", MIN_COEFFICIENT, 1.0), ("high", "Largest", 1.0, MAX_COEFFICIENT))
    )
)  # fmt: skip
LEVEL_GRID = Choice(
    "level_grid", "automatic", meant=0, start=GRID, least=2, most=MOST_GRID,
    tooltip="For searches of noise levels by dynamic programming: how many steps of the scheduler "
    f"to choose from. Automatic is {GRID}, or twice the steps if that is more. For a distilled "
    "model the step count that it was made for: finer paths are not what it was trained on.",
)  # fmt: skip
LAZY = ("clip", "vae", "prompts", "objective", "reference_model")  # only needed to learn


class QSchedJAQCalibrator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        searches = "; ".join(f"{s.name}: {s.summary}" for s in STRATEGIES.values())
        return io.Schema(
            node_id="QSchedJAQCalibrator",
            display_name="JAQ Calibrator",
            category="QSched/calibration",
            description=(
                "Learn the coefficients that give a model its best JAQ on the calibration prompts, and "
                "say whether that holds on prompts the search never saw. A run that was stopped "
                "continues where it was when the same graph is queued again."
            ),
            search_aliases=[
                "calibrate",
                "calibration",
                "learn schedule",
                "optimize",
                "tune",
                "q-sched",
                "hps",
                "clip score",
                "optuna",
            ],
            inputs=[
                *trajectory_inputs(LAZY),
                io.Combo.Input(
                    "search", options=list(STRATEGIES), advanced=True, tooltip=f"{searches}."
                ),
                BUDGET.input(optional=False),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    advanced=True,
                    tooltip="Of the search. Another one learns anew.",
                ),
                io.Boolean.Input(
                    "guard",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Keep c = 1 unless the gain on the held-out prompts has a 95 % interval "
                        "above 0."
                    ),
                ),
                negative_input(),
                *option_inputs(),
                *search_inputs(),
            ],
            outputs=[
                Schedule.Output(
                    display_name="schedule",
                    tooltip="What was learned; the plain solver if nothing helps.",
                ),
                io.Image.Output(
                    display_name="report_image", tooltip="Scores, coefficients and pictures, drawn."
                ),
                io.String.Output(display_name="report", tooltip="The same as text."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    def check_lazy_status(cls, learned="", **inputs):
        """What is only needed to learn is left alone where that was done already."""
        if recalled(learned, cls.hidden.prompt, cls.hidden.unique_id) is not None:
            return []
        return [name for name in LAZY if name in inputs and inputs[name] is None]

    @classmethod
    @own_inputs
    @text_only
    def validate_inputs(cls, storage=""):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        try:
            _database(storage, None)
        except (ValueError, MissingDependencyError) as error:
            return str(error)
        return True

    @classmethod
    @with_choices(BUDGET, LOW, HIGH, LEVEL_GRID)
    @with_options
    @wired("model", "clip", "vae", "prompts", "objective", reference_model="model")
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        search, seed, guard, budget=None, negative="", low=None, high=None, radius=0.1,
        ramp_ends=False, fidelity="full", proposals=1, storage="", study="", reference_model=None,
        level_grid=None, learned="", preset=OWN, options=None,
    ) -> io.NodeOutput:  # fmt: skip
        before = recalled(learned, cls.hidden.prompt, cls.hidden.unique_id)
        if before is not None:
            return cls._as_before(before)
        search, budget = chosen(preset, search, budget or 0)
        settings = _settings(
            search,
            budget,
            low,
            high,
            radius,
            ramp_ends,
            fidelity,
            proposals,
            seed,
            guard,
            level_grid,
        )
        place = StudyPlace(studies_folder(), _database(storage, study), study)
        sampling = (solver, scheduler, steps, cfg, width, height, negative, options)
        source, reference = source_of(model, clip, vae, *sampling), None
        if reference_model is not None:
            reference = source_of(reference_model, clip, vae, *sampling)
        live = CalibrationLive(cls.hidden.unique_id, source, prompts)
        result = calibrate(source, objective, prompts, settings, place, reference, live.monitor())
        picture, text = report_of(result, source, live.thumbnails, prompts), report_text(result)
        live.finished(picture)
        content = {
            "preset": objective.preset,
            "objective": objective.describe(),
            "report": text,
            **result.to_dict(),
        }
        shown = ui.PreviewImage(as_tensor(picture), cls=cls).as_dict()
        shown |= on_node(verdict_text(result), json.dumps(content))
        cls._remember(result.schedule)
        return io.NodeOutput(result.schedule, as_tensor(picture), text, ui=shown)

    @classmethod
    def _remember(cls, schedule) -> None:
        hidden = cls.hidden
        remember(schedule, hidden.prompt, hidden.extra_pnginfo, hidden.unique_id)

    @classmethod
    def _as_before(cls, schedule) -> io.NodeOutput:
        """What this graph learned before, from the workflow itself."""
        picture = as_tensor(chart.draw(schedule))
        text = f"learned before, by this same graph\n{summary.summary(schedule)}"
        cls._remember(schedule)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        content = json.dumps({"schedule": schedule.to_json(), "report": text, "new_trials": 0})
        return io.NodeOutput(schedule, picture, text, ui=shown | on_node(text, content))


def search_inputs() -> list:
    """Rarely needed settings of the search: its range, its pruner, and a study that servers share."""
    return [
        LOW.input(),
        HIGH.input(),
        io.Float.Input(
            "radius", default=0.1, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="How far a step's own coefficients may go from the best found before.",
        ),
        io.Boolean.Input(
            "ramp_ends", default=False, optional=True, advanced=True,
            tooltip="Search where the ramps end as well; otherwise they end at 1.",
        ),
        io.Combo.Input(
            "fidelity", options=list(PRUNERS), default="full", optional=True, advanced=True,
            tooltip="; ".join(f"{p.name}: {p.summary}" for p in PRUNERS.values()) + ".",
        ),
        io.Int.Input(
            "proposals", default=1, min=1, max=64, optional=True, advanced=True,
            tooltip="Candidates proposed at a time and made in one batch: more uses a large GPU "
            "better, and learns less from each.",
        ),
        io.String.Input(
            "storage", default="", optional=True, advanced=True,
            tooltip="Where several queues or servers share one search: env:QSCHED_STORAGE for that "
            "variable of the servers, which holds a database's URL, or a plain name such as "
            "my-studies for a file of this machine. Empty: a file for this search alone.",
        ),
        io.String.Input(
            "study", default="", optional=True, advanced=True,
            tooltip="With storage: the name under which the servers find each other.",
        ),
        io.Model.Input(
            "reference_model", optional=True,
            tooltip="The same model, not quantized, if it fits: says whether the gain repairs the "
            "quantization or would come to any model, and how much could be repaired at all.",
            lazy=True,
        ),
        LEVEL_GRID.input(),
        io.String.Input(
            LEARNED, default="", optional=True, advanced=True, dynamic_prompts=False,
            tooltip="Filled in by itself in the workflow of every picture: what was learned. As long "
            "as nothing before this node is changed it is taken instead of learning anew. Empty it "
            "to learn anew.",
        ),
        io.Combo.Input(
            "preset", options=list(PRESETS), default=OWN, optional=True,
            tooltip="How thorough the search is. "
            + ". ".join(f"{p.name}: {p.summary}" for p in PRESETS.values()) + ".",
        ),
    ]  # fmt: skip


def _settings(
    search, budget, low, high, radius, ramp_ends, fidelity, proposals, seed, guard, grid
) -> CalibrationSettings:
    return CalibrationSettings(
        strategy=search, budget=budget, seed=seed, guard=guard, low=low, high=high, radius=radius,
        ends=ramp_ends, pruner=fidelity, proposals=proposals, grid=grid or 0,
    )  # fmt: skip


def _database(storage: str | None, study: str | None) -> Database | None:
    """The shared database; ValueError for one that a workflow may not name.

    None where ``storage`` is empty, or wired: then it is checked when the node runs."""
    if storage is None:
        return None
    database = workflow_rule(studies_folder()).database(storage)
    if database is not None and study is not None:
        check_shared(database, study)
    return database


NODES = (QSchedJAQCalibrator,)
