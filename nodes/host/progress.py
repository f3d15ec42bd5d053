"""What a node says while it runs: ComfyUI's (0.30.0) bar, preview and text on the node."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import ClassVar

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ...qsched_core.evaluation import Arm
from ...qsched_core.evaluation import Progress as EvaluationProgress
from ...qsched_core.prompts import CalibrationPrompts
from ...qsched_core.rounding import PROVING, SAMPLING, BlockDone, Progress
from ...qsched_core.rounding.proof import MODELS
from ...qsched_core.search.course import duration
from ...qsched_core.text import markup_free, plain

BLOCKS = "blocks"
logger = logging.getLogger(__name__)


def report(node_id: str | None, warnings: Sequence[str], note: str) -> None:
    """Show ``note`` on the node, and every warning that is not empty; those go to the log too.

    All at once: what is shown next takes its place, as this does with an earlier run's.
    """
    found = [text for text in warnings if text]
    for text in found:
        logger.warning(plain(text))
    progress_text(node_id, "\n".join(f"{text}." for text in (*found, note)))


def progress_text(node_id: str | None, text: str) -> None:
    """Show ``text`` on the running node, in the page that queued it, where there is a server.

    The page takes it for HTML: what would be a tag is escaped.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        # Without the id every open page would show it, on whatever node has that number there.
        server.send_progress_text(markup_free(text), node_id, server.client_id)


def on_node(text: str, content: str | None = None) -> dict:
    """A node's ``ui``: shows ``text`` on the node that runs, and leaves ``content``, or the text, in
    the history.

    The text of ComfyUI's own ``PreviewText`` is drawn on no node but its Preview Any.
    """
    context = get_executing_context()
    progress_text(None if context is None else context.node_id, text)
    return {"text": (text if content is None else content,)}


class RoundingLive:
    """Progress of calibrated rounding: one bar for all its parts, and a line of text.

    A walk's parts take about as long as ``SHARES`` says, encoding their prompts included.  For a size
    there are several ``walks``, after layers were weighed.  The bar never falls.
    """

    SHARES: ClassVar[dict[str, tuple[float, float]]] = {
        SAMPLING: (0.0, 0.15), BLOCKS: (0.15, 0.8), PROVING: (0.8, 1.0),
    }  # fmt: skip
    WEIGHED = 0.15  # of the whole, where layers are weighed
    ENCODED = 0.3  # of a part, where its prompts are encoded

    def __init__(self, node_id: str | None, walks: int, prompts: CalibrationPrompts):
        self.node_id, self.walks = node_id, walks
        self.compared = MODELS * len(prompts.heldout)  # pictures that are made to compare
        texts = {SAMPLING: set(prompts.calibration.prompts), PROVING: set(prompts.heldout.prompts)}
        self.texts, self.encoded = texts, {part: set() for part in texts}
        self.bar = comfy.utils.ProgressBar(1000, node_id=node_id)
        self.at, self.walk, self.now = 0, 0, SAMPLING
        self.timed: tuple[float, float] | None = None  # when so many of a part's pictures were made
        self.pace = 0.0  # seconds a picture takes
        progress_text(node_id, "loading the models")

    def prompt_encoded(self, text: str) -> None:
        for part, texts in self.texts.items():
            if text in texts and text not in self.encoded[part]:
                self.encoded[part].add(text)
                told = f"encoding prompts: {len(self.encoded[part])} of {len(texts)}"
                self._moved(part, 0.0, told)

    def part(self, part: str, done: float, total: int) -> None:
        """``done`` of ``total`` prompts; the user's interrupt is raised here too."""
        text, now = f"{part}: {int(done)} of {total}", time.monotonic()
        if part == SAMPLING and not done:
            text = f"loading the models, {text}"
        if not done or self.timed is None or done < self.timed[1]:
            self.timed = (now, done)
        elif done > self.timed[1]:
            self.pace = (now - self.timed[0]) / (done - self.timed[1])
            if part == PROVING:
                text += _left((total - done) * self.pace)
        self._moved(part, done / total, text)

    def block(self, done: BlockDone) -> None:
        text = f"{done.name}: block {done.index + 1} of {done.total}"
        if done.resumed:
            text += ", kept of an earlier run"
        elif done.index + 1 < done.total:
            text += _left(done.seconds_left + self.compared * self.pace)
        self._moved(BLOCKS, (done.index + 1) / done.total, text)

    def within(self, progress: Progress) -> None:
        """Inside a long block."""
        share = (progress.index + progress.done) / progress.total
        text = f"{progress.name}: block {progress.index + 1} of {progress.total}"
        text += _left(progress.seconds_left + self.compared * self.pace)
        self._moved(BLOCKS, share, text)

    def _moved(self, part: str, share: float, text: str) -> None:
        if part in self.SHARES:
            order = list(self.SHARES)
            if order.index(part) < order.index(self.now):
                self.walk = min(self.walk + 1, self.walks - 1)
            self.now = part
            start, end = self.SHARES[part]
            if part in self.texts:
                encoded = len(self.encoded[part]) / len(self.texts[part])
                share = self.ENCODED * encoded + (1 - self.ENCODED) * share
            before = self.WEIGHED if self.walks > 1 else 0.0
            within = (self.walk + start + share * (end - start)) / self.walks
            share = before + (1 - before) * within
            if self.walks > 1:
                text = f"walk {self.walk + 1} of {self.walks}: {text}"
        else:
            share *= self.WEIGHED
        self.at = max(self.at, round(1000 * share))
        self.bar.update_absolute(self.at)
        progress_text(self.node_id, text)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def finished(self, picture) -> None:
        """The report's picture, as it is."""
        self.bar.update_absolute(1000, None, ("PNG", picture, None))


def _left(seconds: float) -> str:
    return f", about {duration(seconds)} left"


class EvaluationLive:
    """Progress of an evaluation: a bar that moves with every step, and a line of text."""

    def __init__(self, node_id: str | None, images: int, steps: int):
        self.node_id, self.steps = node_id, steps
        self.bar = comfy.utils.ProgressBar(images * steps, node_id=node_id)
        self.done = self.within = 0.0

    def step(self, arm: Arm, images: int) -> None:
        """A sampling step is done, in a part that makes ``images``."""
        batches = -(-images // arm.source.max_batch)
        self.within = min(self.within + images / batches, images * self.steps)
        self.bar.update_absolute(round(self.done + self.within))

    def part(self, progress: EvaluationProgress) -> None:
        """A part is finished; the user's interrupt is raised here too."""
        self.done, self.within = progress.done * self.steps, 0.0
        self.bar.update_absolute(round(self.done))
        progress_text(
            self.node_id, f"{progress.arm.label}: {progress.done} of {progress.total} images"
        )
        comfy.model_management.throw_exception_if_processing_interrupted()
