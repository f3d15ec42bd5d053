"""Objective nodes: what calibration maximises, and the score of any images."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..qsched_core import objective as jaq
from ..qsched_core.prompts import PromptError, parse_prompts
from ..qsched_core.scorers import ScorerError, check_scorer
from . import host_scoring
from .types import Objective


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


class QSchedJAQScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedJAQScore",
            display_name="JAQ Score",
            category="QSched/calibration",
            description="Score images against their prompts.",
            inputs=[
                io.Image.Input("images"),
                Objective.Input("objective"),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One for all images, or as many lines as there are images, in their order.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="scores"),
                io.Float.Output(display_name="mean"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, objective, prompts) -> io.NodeOutput:
        lines = _lines(prompts, len(images))
        scores = objective.score(images[..., :3].cpu(), lines)
        content = {
            "preset": objective.preset,
            "prompts": list(lines),
            "scores": scores.to_dict(),
            "means": scores.means(),
        }
        text = json.dumps(content)
        return io.NodeOutput(text, scores.mean(), ui=ui.PreviewText(text))


def _lines(text: str, images: int) -> tuple[str, ...]:
    lines = parse_prompts(text, "prompts", distinct=False)
    if len(lines) == 1:
        return lines * images
    if len(lines) != images:
        raise PromptError(
            f"prompts has {len(lines)} lines for {images} images; give one line for all of them, or "
            "one an image"
        )
    return lines


NODES = (QSchedJAQObjective, QSchedJAQScore)
