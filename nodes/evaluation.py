"""The evaluation node: what a schedule does on held-out prompts."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..qsched_core.evaluation import (
    RUNNER_BYTES,
    Evaluation,
    EvaluationError,
    evaluate,
    usable_spaces,
)
from ..qsched_core.evaluation.picture import report_picture
from ..qsched_core.evaluation.study import check_folder
from ..qsched_core.evaluation.table import images_csv, report_text, summary_csv
from ..qsched_core.files import write_atomic
from ..qsched_core.prompts import CalibrationPrompts, PromptSet
from . import host_evaluation, host_scoring
from .host_evaluation import BASELINE, QUANTIZED, SCHEDULE
from .options import OWN, chosen_options, option_inputs
from .pictures import as_tensor
from .trajectory import negative_input, objective_and_runner, trajectory_inputs
from .types import Schedule

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
                        "Writes NAME.csv (every image's scores) and NAME-summary.csv (means, gains, "
                        "distances) into the output folder, in place of files of that name. Empty "
                        "writes nothing."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(display_name="scores"),
                io.Image.Output(display_name="images"),
                io.Image.Output(display_name="report_image"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, csv_name=""):
        try:
            _csv_paths(csv_name)
        except EvaluationError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        schedule=None, negative="", compare=False, eta=OWN, gamma=OWN, reference_model=None,
        reference_images=None, evaluate_on=HELDOUT, csv_name="",
    ) -> io.NodeOutput:  # fmt: skip
        sigmas, _, runner = objective_and_runner(
            model,
            clip,
            vae,
            objective,
            solver,
            scheduler,
            steps,
            cfg,
            width,
            height,
            negative,
            chosen_options(solver, eta, gamma),
            memory=RUNNER_BYTES,
        )
        match = None if schedule is None else schedule.at(sigmas.tolist())
        changes = match is not None and {*match.correction.c_x, *match.correction.c_eps} != {1.0}
        arms = host_evaluation.model_arms(
            model, clip, vae, runner, objective, match.correction if changes else None,
            base=compare or reference_model is not None,
        )  # fmt: skip
        if reference_model is not None:
            arms.insert(
                0,
                host_evaluation.reference_arm(
                    reference_model, clip, vae, runner, scheduler, steps, objective
                ),
            )
        files = _csv_paths(csv_name)
        for path in files:
            check_folder(path.parent, 0)
        chosen = _chosen(prompts, evaluate_on)
        spaces, notes = usable_spaces(objective.encoder, host_scoring.ManagedPlacement())
        images = len(arms) * len(chosen)
        live = host_evaluation.Live(cls.hidden.unique_id, images, len(sigmas) - 1)
        found = evaluate(
            arms,
            chosen,
            objective,
            spaces,
            host_evaluation.evaluations_folder(),
            baseline=None if reference_model is None else BASELINE,
            references=None if reference_images is None else reference_images[..., :3],
            notes=notes,
            on_progress=live.part,
            on_step=live.step,
        )
        for path, make in zip(files, (images_csv, summary_csv), strict=False):
            write_atomic(path, make(found))
        main, text = arms[-1], report_text(found)
        content = {
            **_content(found, main.name),
            "preset": objective.preset,
            "c_x": list(main.correction.c_x),
            "c_eps": list(main.correction.c_eps),
            "note": "" if match is None else match.note,
            "provenance": main.facts,
            "report": text,
            "files": [str(path) for path in files],
        }
        picture = as_tensor(report_picture(found))
        scores, scratch = json.dumps(content), host_evaluation.scratch_folder()
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | {"text": (scores,)}
        return io.NodeOutput(scores, found[main.name].images(scratch), picture, text, ui=shown)


def _csv_paths(name: str | None) -> list:
    """Where the two files go; none for an empty name, and for a wired one (None) not known yet."""
    if not name:
        return []
    return [
        host_evaluation.output_path(name, ".csv"),
        host_evaluation.output_path(f"{name.removesuffix('.csv')}-summary", ".csv"),
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
    """The evaluation as plain JSON, the main arm's scores first."""
    result = found[main]
    content = found.to_dict() | {
        "scores": result.scores.to_dict(),
        "means": result.scores.means(),
        "interval": result.intervals["jaq"].to_dict(),
        "model_evaluations": sum(arm.model_evaluations for arm in found.arms),
        "seconds": sum(arm.seconds for arm in found.arms),
    }
    if main == SCHEDULE and any(arm.name == QUANTIZED for arm in found.arms):
        base = found[QUANTIZED].scores
        content["base"] = {"scores": base.to_dict(), "means": base.means()}
        gains = found.comparison(QUANTIZED, SCHEDULE).gains
        content["gain"] = gains["jaq"].to_dict() if gains else None
    return content


NODES = (QSchedEvaluate,)
