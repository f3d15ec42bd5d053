"""What a node says while it runs: ComfyUI's (0.30.0) bar, preview and text on the node."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ...qsched_core.evaluation import Arm
from ...qsched_core.evaluation import Progress as EvaluationProgress
from ...qsched_core.text import markup_free, plain

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
