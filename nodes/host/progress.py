"""What a node says while it runs: ComfyUI's (0.30.0) bar, preview and text on the node."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ...qsched_core.evaluation import Arm
from ...qsched_core.evaluation import Progress as EvaluationProgress
from ...qsched_core.rounding import PROVING, SAMPLING, BlockDone, Progress
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
    """Show ``text`` on the running node, where there is a server to show it.

    The page takes it for HTML: what would be a tag is escaped.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(markup_free(text), node_id)


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

    The parts take about as long as ``SHARES`` says.
    """

    SHARES: ClassVar[dict[str, tuple[float, float]]] = {
        SAMPLING: (0.0, 0.15), BLOCKS: (0.15, 0.8), PROVING: (0.8, 1.0),
    }  # fmt: skip

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(1000, node_id=node_id)

    def part(self, part: str, done: int, total: int) -> None:
        """``done`` of ``total`` prompts; the user's interrupt is raised here too."""
        self._moved(part, done / total, f"{part}: {done} of {total}")

    def block(self, done: BlockDone) -> None:
        text = f"{done.name}: block {done.index + 1} of {done.total}"
        if done.resumed:
            text += ", kept of an earlier run"
        elif done.index + 1 < done.total:
            text += f", about {_duration(done.seconds_left)} left"
        self._moved(BLOCKS, (done.index + 1) / done.total, text)

    def within(self, progress: Progress) -> None:
        """Inside a long block."""
        share = (progress.index + progress.done) / progress.total
        text = f"{progress.name}: block {progress.index + 1} of {progress.total}"
        text += f", about {_duration(progress.seconds_left)} left"
        self._moved(BLOCKS, share, text)

    def _moved(self, part: str, share: float, text: str) -> None:
        start, end = self.SHARES.get(part, (0.0, 0.15))
        self.bar.update_absolute(round(1000 * (start + share * (end - start))))
        progress_text(self.node_id, text)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def finished(self, picture) -> None:
        """The report's picture, as it is."""
        self.bar.update_absolute(1000, None, ("PNG", picture, None))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02}:{rest:02}"


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
