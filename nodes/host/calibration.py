"""A calibration on its node, inside ComfyUI (0.30.0): what it shows while it runs, and its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from ...qsched_core.calibration import CalibrationResult
from ...qsched_core.calibration.report import Sample, report_path, report_picture, typical
from ...qsched_core.files import write_atomic
from ...qsched_core.prompts import CalibrationPrompts, PromptSet
from ...qsched_core.search import Monitor, Progress, Standing
from ...qsched_core.trajectory import Candidate
from .pictures import as_png, contact_sheet, shrink
from .progress import progress_text
from .source import ComfySource

PREVIEWS = 12
logger = logging.getLogger(__name__)

Thumbnails = dict[tuple[Candidate, int], torch.Tensor]  # uint8 pictures by candidate and seed
BEGUN = 1  # a step of the bar: loading a text encoder takes seconds, at a bar that shows nothing


class CalibrationLive:
    """Progress on the node: one bar for all parts, the best candidate's pictures, a line of text.

    What the page was shown last stays there, in front of the node's own output, so that is the
    report's picture.

    ``thumbnails`` holds the source's pictures, never a reference's.  Those of finished trials are
    dropped, so that the pictures of the held-out prompts remain at the end.
    """

    def __init__(self, node_id: str | None, source: ComfySource, prompts: CalibrationPrompts):
        self.node_id, self.source = node_id, source
        self.texts = {*prompts.calibration.prompts, *prompts.heldout.prompts}
        self.encoded: set[str] = set()
        source.on_encoded = self.prompt_encoded
        self.bar: comfy.utils.ProgressBar | None = None
        self.standing: Standing | None = None
        self.preview: Image.Image | None = None
        self.text = "loading the models"
        self.thumbnails: Thumbnails = {}
        progress_text(node_id, self.text)

    def monitor(self) -> Monitor:
        return Monitor(self.trial_done, self.moved, self.pictures_made, self.waiting)

    def pictures_made(self, source, candidate: Candidate, prompts: PromptSet, images) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if source is self.source:
            kept = zip(prompts.seeds, shrink(images), strict=True)
            self.thumbnails |= {(candidate, seed): picture for seed, picture in kept}

    def trial_done(self, progress: Progress) -> None:
        """The pictures of the best one so far."""
        if progress.improved or self.preview is None:
            pictures = [
                picture
                for (candidate, _), picture in self.thumbnails.items()
                if candidate == progress.trial.candidate
            ]
            self.preview = contact_sheet(torch.stack(pictures[:PREVIEWS])) if pictures else None
            if self.preview is not None and self.bar is not None:
                shown = ("JPEG", self.preview, 1024)
                self.bar.update_absolute(self.bar.current, None, shown)
        done_with = progress.trial.candidate
        self.thumbnails = {k: v for k, v in self.thumbnails.items() if k[0] != done_with}
        comfy.model_management.throw_exception_if_processing_interrupted()

    def prompt_encoded(self, text: str) -> None:
        """Of all prompts, each of which counts as a step of a picture."""
        if text in self.encoded or text not in self.texts:
            return
        self.encoded.add(text)
        if self.standing is not None:
            said = f"encoding prompts: {len(self.encoded)} of {len(self.texts)}"
            self._draw(self.standing, said)

    def moved(self, standing: Standing) -> None:
        self.standing = standing
        self._draw(standing, standing.text)

    def _draw(self, standing: Standing, text: str) -> None:
        total = BEGUN + round(standing.total) + len(self.texts)
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total, node_id=self.node_id)
        self.bar.update_absolute(BEGUN + round(standing.done) + len(self.encoded), total)
        if text != self.text:
            self.text = text
            progress_text(self.node_id, text)

    def finished(self, picture: Image.Image) -> None:
        """The report's picture, as it is."""
        if self.bar is not None:
            self.bar.update_absolute(self.bar.total, None, ("PNG", picture, None))

    def waiting(self) -> None:
        """Other servers have the remaining trials."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.text = "waiting for the trials of other servers"
        progress_text(self.node_id, self.text)


def report_of(
    result: CalibrationResult,
    source: ComfySource,
    thumbnails: Mapping,
    prompts: CalibrationPrompts,
) -> Image.Image:
    """The report's picture.

    It is kept beside the study: a finished study then makes no images for its report."""
    path = report_path(result, prompts.heldout)
    pair = (result.baseline.candidate, result.winner.candidate)
    gains = np.subtract(result.heldout_after.jaq, result.heldout_before.jaq).tolist()
    chosen = typical(gains)
    shown = PromptSet(
        tuple(prompts.heldout.prompts[i] for i in chosen),
        tuple(prompts.heldout.seeds[i] for i in chosen),
    )
    judged = all((candidate, seed) in thumbnails for candidate in pair for seed in shown.seeds)
    if not judged and path.exists():
        with Image.open(path) as kept:
            return kept.convert("RGB")
    if not judged:
        thumbnails = {
            (candidate, seed): picture
            for candidate, images in zip(pair, source.images(shown, pair), strict=True)
            for seed, picture in zip(shown.seeds, shrink(images), strict=True)
        }
    samples = [
        Sample(
            prompts.heldout.prompts[i],
            gains[i],
            *(Image.fromarray(thumbnails[candidate, seed].numpy()) for candidate in pair),
        )
        for i, seed in zip(chosen, shown.seeds, strict=True)
    ]
    picture = report_picture(result, samples)
    _keep(picture, path)
    return picture


def _keep(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, as_png(picture))
    except OSError as error:  # Losing it costs no more than drawing it again.
        logger.warning("the report's picture could not be kept: %s", error)
