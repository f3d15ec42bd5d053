"""Objective nodes: what calibration maximises, and the score of any images."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..qsched_core import objective as jaq
from ..qsched_core.prompts import PromptError, parse_prompts
from ..qsched_core.scorers import SCORERS, ScorerError, scorer_names
from ..qsched_core.text import shown
from .host import scoring
from .host.progress import on_node
from .types import Objective
from .wired import text_only, wired

NONE = "none"
OWN_WEIGHTS = [entry for entry in SCORERS.values() if entry.needs_file]


class QSchedJAQObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedJAQObjective",
            display_name="JAQ Objective",
            category="QSched/calibration",
            description=(
                "What calibration maximises, without reference images: log(CLIPScore) + k * quality, or "
                "another preset or sum of scorers."
            ),
            search_aliases=[
                "clip score",
                "hps",
                "hpsv2",
                "pickscore",
                "aesthetic",
                "clip-iqa",
                "pyiqa",
                "musiq",
                "reward",
                "metric",
            ],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=scoring.scorer_files(),
                    tooltip=(
                        "An open_clip model: it measures how well images show their prompts, and "
                        "their quality by antonym prompts. A file in models/clip_score, or one of "
                        "those with size and licence, which allow_download fetches into that folder "
                        "when the node runs first. Larger ones judge better."
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
                    tooltip=(
                        "Your consent: the model that clip_name or architecture names is downloaded, "
                        "once, and so is a metric of pyiqa. Off: nothing is downloaded."
                    ),
                ),
                io.String.Input(
                    "formula",
                    default="",
                    optional=True,
                    tooltip=(
                        "Empty: log(CLIPScore) + quality_weight * quality. A preset: clip+clipiqa, "
                        "clip+pyiqa:METRIC, or aq+hps (every thing the prompt names, and human "
                        "preference). Or a weighted sum, such as clip + 2*clip_iqa + 0.5*pickscore, of "
                        f"{', '.join(scorer_names())}; quality_weight has no part in it."
                    ),
                ),
                *(
                    io.Combo.Input(
                        f"{entry.name}_name",
                        options=[NONE, *scoring.weight_files()],
                        default=NONE,
                        optional=True,
                        advanced=True,
                        tooltip=(
                            f"Weights in models/clip_score for the term {entry.name} of the "
                            f"formula. Licence: {entry.licence}."
                        ),
                    )
                    for entry in OWN_WEIGHTS
                ),
            ],
            outputs=[
                Objective.Output(
                    display_name="objective",
                    tooltip="For JAQ Calibrator, JAQ Evaluate and JAQ Score.",
                )
            ],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, quality):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        if quality is None:  # wired: checked when it runs
            return True
        try:
            jaq.recipe_of("", quality)
        except ScorerError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, clip_name, **inputs):
        names = [clip_name, *(inputs.get(f"{entry.name}_name", NONE) for entry in OWN_WEIGHTS)]
        versions = []
        for name in names:
            if name == NONE or scoring.is_by_name(name):
                versions.append(name)
            else:
                file = scoring.scorer_path(name).stat()
                versions.append(f"{file.st_size} {file.st_mtime_ns}")
        return " ".join(versions)

    @classmethod
    def execute(
        cls, clip_name, quality, quality_weight, architecture="", allow_download=False, formula="",
        hps_name=NONE, pickscore_name=NONE, aesthetic_name=NONE,
    ) -> io.NodeOutput:  # fmt: skip
        names = {"hps": hps_name, "pickscore": pickscore_name, "aesthetic": aesthetic_name}
        files = {
            key: scoring.scorer_path(name, f"{key}_name")
            for key, name in names.items()
            if name != NONE
        }
        _check_weights(formula, quality, names)
        place = scoring.ManagedPlacement()
        encoder = scoring.load_encoder(clip_name, architecture, allow_download, place)
        found = jaq.Objective(
            encoder, quality.strip(), quality_weight, place, formula, files, allow_download
        )
        return io.NodeOutput(found, ui=on_node(f"JAQ: {found.preset}"))


def _check_weights(formula: str, quality: str, names: dict[str, str]) -> None:
    """ScorerError for a formula that can't be read, or whose weights are not chosen."""
    recipe = jaq.recipe_of(formula, quality)
    for term in (*recipe.alignment, *recipe.quality):
        if names.get(term.spec) == NONE:
            raise ScorerError(
                f"formula={shown(formula)}: {term.spec} needs its weights; choose {term.spec}_name"
            )


class QSchedJAQScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedJAQScore",
            display_name="JAQ Score",
            category="QSched/calibration",
            description="Score images against their prompts.",
            search_aliases=["clip score", "hps", "rate images", "metric", "aesthetic score", "iqa"],
            inputs=[
                io.Image.Input("images", tooltip="What to score."),
                Objective.Input("objective", tooltip="From JAQ Objective: what is measured."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One for all images, or as many lines as there are images, in their order.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="scores", tooltip="JSON: every image's terms, and their means."
                ),
                io.Float.Output(display_name="mean", tooltip="The mean JAQ; higher is better."),
            ],
            is_output_node=True,
        )

    @classmethod
    @wired("objective")
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
        return io.NodeOutput(text, scores.mean(), ui=on_node(_said(scores), text))


def _said(scores: jaq.Scores) -> str:
    """The means, to be read."""
    means = ", ".join(f"{name} {value:.4f}" for name, value in scores.means().items())
    return f"mean of {len(scores)} images: {means}"


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
