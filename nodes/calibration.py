"""The calibration node: the search for a model's coefficients."""

from __future__ import annotations

import json
import logging
import time
from io import BytesIO
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..qsched_core.files import write_atomic
from ..qsched_core.optional import MissingDependencyError
from ..qsched_core.prompts import (
    CalibrationPrompts,
    PromptSet,
)
from ..qsched_core.schedule import MAX_COEFFICIENT
from ..qsched_core.search import (
    FIDELITIES,
    STRATEGIES,
    CalibrationResult,
    CalibrationSettings,
    Database,
    Progress,
    Reference,
    calibrate,
    check_shared,
    workflow_rule,
)
from ..qsched_core.search.precheck import compared
from ..qsched_core.search.report import Sample, report_path, report_picture, report_text, typical
from . import host, host_scoring
from .options import OWN, check_options, chosen_options, option_inputs
from .pictures import as_tensor
from .trajectory import negative_input, objective_and_runner, trajectory_inputs
from .types import MAX_SEED, Schedule

PREVIEWS = 12
logger = logging.getLogger(__name__)


class QSchedJAQCalibrator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        searches = "; ".join(f"{s.name}: {s.summary}" for s in STRATEGIES.values())
        budgets = ", ".join(f"{s.name} {s.default_budget}" for s in STRATEGIES.values())
        return io.Schema(
            node_id="QSchedJAQCalibrator",
            display_name="JAQ Calibrator",
            category="QSched/calibration",
            description=(
                "Learn the coefficients that give a model its best JAQ on the calibration prompts, and "
                "say whether that holds on prompts the search never saw. A run that was stopped "
                "continues where it was when the same graph is queued again."
            ),
            inputs=[
                *trajectory_inputs(),
                io.Combo.Input("search", options=list(STRATEGIES), tooltip=f"{searches}."),
                io.Int.Input(
                    "budget",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip=f"Candidates to try; 0 is the search's own number ({budgets}).",
                ),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED, tooltip="Of the search."),
                io.Boolean.Input(
                    "guard",
                    default=True,
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
                Schedule.Output(display_name="schedule"),
                io.Image.Output(display_name="report_image"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, search, budget, solver=None, eta=OWN, gamma=OWN, low=0.0, high=0.0, radius=0.1,
        ramp_ends=False, fidelity="full", proposals=1, storage="", study="",
    ):  # fmt: skip
        wrong = check_options(solver, eta, gamma)
        if wrong:
            return wrong
        values = (search, budget, low, high, radius, ramp_ends, fidelity, proposals)
        try:
            if None not in values:  # wired: checked when it runs
                _settings(*values)
            _database(storage, study)
        except (ValueError, MissingDependencyError) as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        search, budget, seed, guard, negative="", eta=OWN, gamma=OWN, low=0.0, high=0.0,
        radius=0.1, ramp_ends=False, fidelity="full", proposals=1, storage="", study="",
        reference_model=None,
    ) -> io.NodeOutput:  # fmt: skip
        settings = _settings(
            search, budget, low, high, radius, ramp_ends, fidelity, proposals, seed, guard
        )
        database = _database(storage, study)
        trajectory = (
            clip, vae, objective, solver, scheduler, steps, cfg, width, height, negative,
            chosen_options(solver, eta, gamma),
        )  # fmt: skip
        sigmas, flow, runner = objective_and_runner(model, *trajectory)
        scored = host_scoring.ScoredRunner(runner, objective)
        live = _Live(cls.hidden.unique_id, scored)
        reference, counts = None, [scored.count]
        if reference_model is not None:
            reference, count = _reference(reference_model, trajectory, runner, objective, prompts)
            counts.append(count)
        result = calibrate(
            scored,
            sigmas.tolist(),
            flow,
            solver,
            settings,
            prompts,
            host_scoring.graph_provenance(model, clip, vae, runner, objective),
            host_scoring.studies_folder(),
            on_trial=live.trial_done,
            count_evaluations=lambda: sum(count() for count in counts),
            storage=database,
            study=study,
            idle=live.waiting,
            reference=reference,
        )
        picture, text = _report(result, scored, prompts), report_text(result)
        host.progress_text(cls.hidden.unique_id, result.verdict.text)
        content = {
            "preset": objective.preset,
            "objective": objective.describe(),
            "report": text,
            **result.to_dict(),
        }
        shown = ui.PreviewImage(as_tensor(picture), cls=cls).as_dict()
        shown |= {"text": (json.dumps(content),)}
        return io.NodeOutput(result.schedule, as_tensor(picture), text, ui=shown)


def search_inputs() -> list:
    """How to search, beside the strategy: for those who want another box, or several servers."""
    return [
        io.Float.Input(
            "low", default=0.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True,
            tooltip="Least value of the ramps; 0 is the search's own.",
        ),
        io.Float.Input(
            "high", default=0.0, min=0.0, max=MAX_COEFFICIENT, step=0.05, optional=True,
            advanced=True, tooltip="Largest value of the ramps; 0 is the search's own.",
        ),
        io.Float.Input(
            "radius", default=0.1, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="How far a step's own coefficients may go from the best found before.",
        ),
        io.Boolean.Input(
            "ramp_ends", default=False, optional=True, advanced=True,
            tooltip="Search where the ramps end as well; otherwise they end at 1.",
        ),
        io.Combo.Input(
            "fidelity", options=list(FIDELITIES), default="full", optional=True, advanced=True,
            tooltip="; ".join(f"{f.name}: {f.summary}" for f in FIDELITIES.values()) + ".",
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
        ),
    ]  # fmt: skip


def _settings(
    search, budget, low, high, radius, ramp_ends, fidelity, proposals, seed=0, guard=True
) -> CalibrationSettings:
    return CalibrationSettings(
        strategy=search, budget=budget, seed=seed, guard=guard, low=low or None, high=high or None,
        radius=radius, ends=ramp_ends, fidelity=fidelity, proposals=proposals,
    )  # fmt: skip


def _database(storage: str | None, study: str | None) -> Database | None:
    """The shared database; ValueError for one that no workflow may name.  None: checked later."""
    if storage is None:
        return None
    database = workflow_rule(host_scoring.studies_folder()).database(storage)
    if database is not None and study is not None:
        check_shared(database, study)
    return database


def _reference(model, trajectory: tuple, quantized, objective, prompts: CalibrationPrompts):
    """The unquantized model for the control and the pre-check, and its count of evaluations."""
    clip, vae = trajectory[:2]
    sigmas, _, runner = objective_and_runner(model, *trajectory)
    if not torch.equal(sigmas, quantized.sigmas):
        raise ValueError(
            "reference_model samples at other noise levels than model; connect the same model "
            "without quantization"
        )
    scored = host_scoring.ScoredRunner(runner, objective)
    reference = Reference(
        scored,
        host_scoring.graph_provenance(model, clip, vae, runner, objective),
        lambda: compared(quantized, runner, prompts.calibration, float(sigmas[-1])),
    )
    return reference, scored.count


class _Live:
    """Progress on the node: the bar, the best candidate's pictures, and a line of text."""

    def __init__(self, node_id: str, scored: host_scoring.ScoredRunner):
        self.node_id, self.scored = node_id, scored
        self.bar: comfy.utils.ProgressBar | None = None
        self.preview: Image.Image | None = None

    def trial_done(self, progress: Progress) -> None:
        done = progress.trial.number + 1
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(progress.total, node_id=self.node_id)
        if progress.improved or self.preview is None:
            pictures = self.scored.thumbnails.get(progress.trial.correction)
            self.preview = None if pictures is None else contact_sheet(pictures[:PREVIEWS])
        preview = None if self.preview is None else ("JPEG", self.preview, 1024)
        self.bar.update_absolute(done, progress.total, preview)
        host.progress_text(
            self.node_id,
            f"trial {done} of {progress.total}, best JAQ {progress.best.value:.4f}, "
            f"about {_duration(progress.seconds_left)} left",
        )
        comfy.model_management.throw_exception_if_processing_interrupted()

    def waiting(self) -> None:
        """Other servers have the remaining trials."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        host.progress_text(self.node_id, "waiting for the trials of other servers")


def _duration(seconds: float) -> str:
    text = time.strftime("%H:%M:%S", time.gmtime(max(0, round(seconds))))
    return text.removeprefix("00:")


def contact_sheet(pictures: torch.Tensor, columns: int = 4) -> Image.Image:
    """uint8 pictures [n, height, width, 3] side by side."""
    columns = min(columns, len(pictures))
    height, width = pictures.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        place = (index % columns * width, index // columns * height)
        sheet.paste(Image.fromarray(picture.numpy()), place)
    return sheet


def _report(
    result: CalibrationResult, scored: host_scoring.ScoredRunner, prompts: CalibrationPrompts
) -> Image.Image:
    """The report's picture; kept beside the journal, so that a finished study makes no images."""
    path = report_path(result, prompts.heldout)
    before, after = result.baseline.correction, result.winner.correction
    gains = np.subtract(result.heldout_after.jaq, result.heldout_before.jaq).tolist()
    chosen = typical(gains)
    pictures = scored.thumbnails
    judged = all(
        correction in pictures and len(pictures[correction]) == len(prompts.heldout)
        for correction in (before, after)
    )
    if not judged and path.exists():
        with Image.open(path) as kept:
            return kept.convert("RGB")
    if not judged:
        shown = PromptSet(
            tuple(prompts.heldout.prompts[i] for i in chosen),
            tuple(prompts.heldout.seeds[i] for i in chosen),
        )
        made = scored.runner.images(shown, [before, after])
        pictures = {
            correction: dict(zip(chosen, host_scoring.shrink(images), strict=True))
            for correction, images in zip((before, after), made, strict=True)
        }
    samples = [
        Sample(
            prompts.heldout.prompts[i],
            gains[i],
            Image.fromarray(pictures[before][i].numpy()),
            Image.fromarray(pictures[after][i].numpy()),
        )
        for i in chosen
    ]
    picture = report_picture(result, samples)
    _keep(picture, path)
    return picture


def _keep(picture: Image.Image, path: Path) -> None:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:  # it would only have saved drawing it again
        logger.warning("the report's picture could not be kept: %s", error)


NODES = (QSchedJAQCalibrator,)
