"""The evaluation node: what a schedule does on held-out prompts."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..qsched_core.calibration import provenance_of
from ..qsched_core.evaluation import (
    SOURCE_BYTES,
    Evaluation,
    EvaluationError,
    evaluate,
    usable_spaces,
)
from ..qsched_core.evaluation.picture import report_picture
from ..qsched_core.evaluation.table import images_csv, report_text, summary_csv
from ..qsched_core.evaluation.web import report_page
from ..qsched_core.files import check_room, write_atomic
from ..qsched_core.prompts import CalibrationPrompts, PromptSet
from ..qsched_core.source import check_reference
from ..qsched_core.statistics import mean_interval
from .choices import own_inputs
from .host.evaluation import (
    BASELINE,
    QUANTIZED,
    SCHEDULE,
    made_by,
    model_arms,
    reference_arm,
    scheduled_on,
)
from .host.folders import evaluations_folder, output_path, scratch_folder
from .host.pictures import as_png, as_tensor
from .host.progress import EvaluationLive, on_node
from .host.scoring import ManagedPlacement
from .inputs import (
    negative_input,
    option_inputs,
    source_of,
    trajectory_inputs,
    with_options,
)
from .types import Schedule
from .wired import text_only, wired

HELDOUT, CALIBRATION, ALL = "held-out", "calibration", "all"


class QSchedEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedEvaluate",
            display_name="JAQ Evaluate",
            category="QSched/calibration",
            description=(
                "Score a model, with or without a schedule, on the held-out prompts, beside the "
                "unquantized model where it is connected: every image's terms, means and paired gains "
                "with 95 % intervals, Frechet distances. A run that was stopped continues "
                "where it was when the same graph is queued again."
            ),
            search_aliases=[
                "fid",
                "frechet",
                "benchmark",
                "compare models",
                "clip score",
                "hps",
                "metrics",
                "before after",
            ],
            inputs=[
                *trajectory_inputs(),
                Schedule.Input(
                    "schedule", optional=True, tooltip="Without one, the base solver is scored."
                ),
                negative_input(),
                io.Boolean.Input(
                    "compare",
                    default=False,
                    optional=True,
                    tooltip="With a schedule: score the base solver too, and give the paired gain.",
                ),
                *option_inputs(),
                io.Model.Input(
                    "reference_model",
                    optional=True,
                    tooltip=(
                        "The same model, unquantized: the baseline that the model is compared with, "
                        "with and without the schedule."
                    ),
                ),
                io.Image.Input(
                    "reference_images",
                    optional=True,
                    tooltip="Any pictures, to which the Frechet distance of the made ones is given.",
                ),
                io.Combo.Input(
                    "evaluate_on",
                    options=[HELDOUT, CALIBRATION, ALL],
                    default=HELDOUT,
                    optional=True,
                    tooltip="Which of the prompts. Scores of a schedule on the prompts that it was "
                    "learned on are too good.",
                ),
                io.String.Input(
                    "csv_name",
                    default="",
                    optional=True,
                    tooltip=(
                        "Writes NAME.csv (every image's scores), NAME-summary.csv (means, gains, "
                        "distances), NAME.html (all of it in one page to post, with pictures before "
                        "and after) and NAME.png into the output folder, in place of files of that "
                        "name. Empty writes nothing."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="scores", tooltip="JSON: every figure of the report."
                ),
                io.Image.Output(display_name="images", tooltip="The pictures that were scored."),
                io.Image.Output(
                    display_name="report_image", tooltip="Figures and pictures side by side."
                ),
                io.String.Output(display_name="report", tooltip="The figures as text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    @own_inputs
    @text_only
    def validate_inputs(cls, csv_name=""):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        try:
            _csv_paths(csv_name)
        except EvaluationError as error:
            return str(error)
        return True

    @classmethod
    @with_options
    @wired("model", "clip", "vae", "prompts", "objective", "schedule", reference_model="model")
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        schedule=None, negative="", compare=False, reference_model=None, reference_images=None,
        evaluate_on=HELDOUT, csv_name="", options=None,
    ) -> io.NodeOutput:  # fmt: skip
        sampling = (solver, scheduler, steps, cfg, width, height, negative, options)
        source = source_of(model, clip, vae, *sampling, memory=SOURCE_BYTES)
        scheduled, note = None, ""
        if schedule is not None:
            scheduled, note = scheduled_on(schedule, source)
        arms = model_arms(source, scheduled, base=compare or reference_model is not None)
        if reference_model is not None:
            reference = source_of(reference_model, clip, vae, *sampling, memory=SOURCE_BYTES)
            check_reference(source, reference)
            arms.insert(0, reference_arm(reference))
        files = _csv_paths(csv_name)
        for path in files:
            check_room(path)
        chosen = _chosen(prompts, evaluate_on)
        spaces, notes = usable_spaces(objective.encoder, ManagedPlacement())
        images = len(arms) * len(chosen)
        live = EvaluationLive(cls.hidden.unique_id, images, source.trajectory.steps)
        found = evaluate(
            arms,
            chosen,
            objective,
            spaces,
            evaluations_folder(),
            baseline=None if reference_model is None else BASELINE,
            references=None if reference_images is None else reference_images[..., :3],
            notes=notes,
            on_progress=live.part,
            on_step=live.step,
        )
        picture = report_picture(found)
        for path, make in zip(files, (images_csv, summary_csv, report_page), strict=False):
            write_atomic(path, make(found))
        for path in files[3:]:
            write_atomic(path, as_png(picture))
        main, text = arms[-1], report_text(found)
        content = {
            **_content(found, main.name),
            "preset": objective.preset,
            **main.candidate.correction.to_json(),
            "note": note,
            "provenance": provenance_of(source, objective) | {"code": made_by()},
            "report": text,
            "files": [str(path) for path in files],
        }
        picture = as_tensor(picture)
        scores, scratch = json.dumps(content), scratch_folder()
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | on_node(text, scores)
        return io.NodeOutput(scores, found[main.name].images(scratch), picture, text, ui=shown)


def _csv_paths(name: str | None) -> list:
    """Where the files go: the two tables, the page and the picture.

    Empty for an empty name, and for a wired one (None), which is not known yet."""
    if not name:
        return []
    stem = name.removesuffix(".csv")
    return [
        output_path(name, ".csv"),
        output_path(f"{stem}-summary", ".csv"),
        output_path(stem, ".html"),
        output_path(stem, ".png"),
    ]


def _chosen(prompts: CalibrationPrompts, which: str) -> PromptSet:
    sets = {
        HELDOUT: [prompts.heldout],
        CALIBRATION: [prompts.calibration],
        ALL: [prompts.calibration, prompts.heldout],
    }[which]
    return PromptSet(
        tuple(prompt for members in sets for prompt in members.prompts),
        tuple(seed for members in sets for seed in members.seeds),
    )


def _content(found: Evaluation, main: str) -> dict:
    """The evaluation as plain JSON; the scores of the main arm come first."""
    result = found[main]
    content = found.to_dict() | {
        "scores": result.scores.to_dict(),
        "means": result.scores.means(),
        "interval": mean_interval(result.scores.jaq).to_dict(),
        "nfe": sum(arm.nfe for arm in found.arms),
        "seconds": sum(arm.seconds for arm in found.arms),
    }
    if main == SCHEDULE and any(arm.name == QUANTIZED for arm in found.arms):
        base = found[QUANTIZED].scores
        content["base"] = {"scores": base.to_dict(), "means": base.means()}
        gains = found.comparison(QUANTIZED, SCHEDULE).gains
        content["gain"] = gains["jaq"].to_dict() if gains else None
    return content


NODES = (QSchedEvaluate,)
