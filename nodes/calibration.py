"""Calibration nodes: prompts, objective, and the search for a model's coefficients."""

from __future__ import annotations

import json
import time
from io import BytesIO
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..qsched_core import objective as jaq
from ..qsched_core.files import write_atomic
from ..qsched_core.prompts import (
    CalibrationPrompts,
    PromptError,
    PromptSet,
    bundled_prompts,
    parse_prompts,
)
from ..qsched_core.scorers import ScorerError, check_scorer
from ..qsched_core.search.calibrate import (
    CalibrationResult,
    CalibrationSettings,
    Progress,
    calibrate,
)
from ..qsched_core.search.report import Sample, report_picture, report_text, typical
from ..qsched_core.search.strategies import STRATEGIES
from . import host, host_scoring
from .options import OWN, check_options, chosen_options, option_inputs
from .pictures import as_tensor
from .trajectory import negative_input, objective_and_runner, trajectory_inputs
from .types import Objective, Prompts, Schedule

SOURCES = ("bundled", "text")
MAX_SEED = 2**53 - 1  # what a browser's number keeps exactly
PREVIEWS = 12


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


class QSchedJAQObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedJAQObjective",
            display_name="JAQ Objective",
            category="QSched/calibration",
            description=(
                "What calibration maximises, without reference images: log(CLIPScore) + k * quality."
            ),
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=host_scoring.scorer_files(),
                    tooltip=(
                        "An open_clip model in models/clip_score. It measures how well images show "
                        "their prompts, and their quality by antonym prompts."
                    ),
                ),
                io.String.Input(
                    "quality",
                    default="clip_iqa",
                    tooltip=(
                        "clip_iqa, or pyiqa:METRIC for a no-reference metric of pyiqa (install it "
                        "yourself; licence PolyForm-Noncommercial), for example pyiqa:musiq."
                    ),
                ),
                io.Float.Input(
                    "quality_weight",
                    default=jaq.QUALITY_WEIGHT,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="k: the weight of quality against alignment. The paper uses 2.",
                ),
                io.String.Input(
                    "architecture",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "open_clip's name of the model, for a file that does not say it, for example "
                        "ViT-B-32; or architecture/weights, for example ViT-B-32/laion2b_s34b_b79k, "
                        "when clip_name is by name."
                    ),
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Let open_clip download the model that architecture names.",
                ),
            ],
            outputs=[Objective.Output(display_name="objective")],
        )

    @classmethod
    def validate_inputs(cls, quality):
        if quality is None:  # wired: checked when it runs
            return True
        try:
            check_scorer(quality, "quality")
        except ScorerError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, clip_name, **inputs):
        if clip_name == host_scoring.BY_NAME:
            return clip_name
        facts = host_scoring.scorer_path(clip_name).stat()
        return f"{facts.st_size} {facts.st_mtime_ns}"

    @classmethod
    def execute(
        cls, clip_name, quality, quality_weight, architecture="", allow_download=False
    ) -> io.NodeOutput:
        place = host_scoring.ManagedPlacement()
        encoder = host_scoring.load_encoder(clip_name, architecture, allow_download, place)
        return io.NodeOutput(jaq.Objective(encoder, quality.strip(), quality_weight, place))


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
    def validate_inputs(cls, search, budget, solver=None, eta=OWN, gamma=OWN):
        wrong = check_options(solver, eta, gamma)
        if wrong:
            return wrong
        if search is None or budget is None:  # wired: checked when it runs
            return True
        try:
            CalibrationSettings(strategy=search, budget=budget)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        search, budget, seed, guard, negative="", eta=OWN, gamma=OWN,
    ) -> io.NodeOutput:  # fmt: skip
        settings = CalibrationSettings(strategy=search, budget=budget, seed=seed, guard=guard)
        sigmas, flow, runner = objective_and_runner(
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
        )
        scored = host_scoring.ScoredRunner(runner, objective)
        live = _Live(cls.hidden.unique_id, scored)
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
            count_evaluations=scored.count,
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
    path = result.journal.with_suffix(
        f".{'guarded' if result.verdict.keep_identity else 'free'}.png"
    )
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
    write_atomic(path, buffer.getvalue())


NODES = (QSchedCalibrationPrompts, QSchedJAQObjective, QSchedJAQCalibrator)
