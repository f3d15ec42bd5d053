"""An evaluation inside ComfyUI (0.30.0): its arms, its progress, and where its files go."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import comfyui_version
import folder_paths

from ..qsched_core.evaluation import RUNNER_BYTES, Arm, EvaluationError, Progress
from ..qsched_core.evaluation.run import source_hash
from ..qsched_core.files import safe_name
from ..qsched_core.precondition import ScalarCorrection
from ..qsched_core.text import shown
from . import host, host_scoring
from .host_info import UNQUANTIZED

BASELINE, QUANTIZED, SCHEDULE = "baseline", "quantized", "schedule"


def evaluations_folder() -> Path:
    """Where evaluations are kept."""
    return Path(folder_paths.get_user_directory()) / "qsched" / "evaluations"


def scratch_folder() -> Path:
    """ComfyUI's temporary folder, which it empties when it starts and ends."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_path(name: str, extension: str) -> Path:
    """``name`` with ``extension`` in ComfyUI's output folder; EvaluationError for one that may leave it."""
    root = Path(folder_paths.get_output_directory()).resolve()
    try:
        path = (root / safe_name(name, extension)).resolve()
    except (ValueError, OSError) as error:
        raise EvaluationError(f"csv_name: {error}") from None
    if not path.is_relative_to(root):  # through a link
        raise EvaluationError(f"csv_name={shown(name)} must stay inside the output folder")
    return path


def model_arms(
    model, clip, vae, runner: host.TrajectoryRunner, objective,
    scheduled: ScalarCorrection | None, base: bool,
) -> list[Arm]:  # fmt: skip
    """The model alone (where ``base`` asks for it), and with a schedule's correction."""
    facts = _facts(model, clip, vae, runner, objective)
    form = facts["model"]["format"]
    unquantized = form == UNQUANTIZED
    steps = len(runner.sigmas) - 1
    identity = ScalarCorrection((1.0,) * steps, (1.0,) * steps)
    arms = []
    if base or scheduled is None:
        label = "unquantized" if unquantized else f"quantized ({form})"
        arms.append(Arm(QUANTIZED, runner, identity, facts, label))
    if scheduled is not None:
        label = f"{'unquantized' if unquantized else form} + schedule"
        arms.append(Arm(SCHEDULE, runner, scheduled, facts, label))
    return arms


def reference_arm(
    reference, clip, vae, runner: host.TrajectoryRunner, scheduler: str, steps: int, objective
) -> Arm:
    """The unquantized model on the trajectory of ``runner``: ``steps`` of ``scheduler``.

    EvaluationError for a model of another kind: one that samples other noise levels or latents.
    """
    sigmas, _ = host.sampling_facts(reference, scheduler, steps)
    if sigmas.tolist() != runner.sigmas.tolist():
        raise EvaluationError(
            "reference_model samples other noise levels than model; connect the same model, "
            "unquantized, behind the same model sampling nodes"
        )
    baseline = host.TrajectoryRunner(
        reference, clip, vae, sigmas=sigmas, solver=runner.solver, cfg=runner.cfg,
        negative=runner.negative, width=runner.width, height=runner.height, options=runner.options,
        memory=RUNNER_BYTES,
    )  # fmt: skip
    if baseline.latent.shape != runner.latent.shape:
        raise EvaluationError(
            "reference_model has other latents than model; connect the same model, unquantized"
        )
    ones = (1.0,) * (len(sigmas) - 1)
    identity = ScalarCorrection(ones, ones)
    return Arm(BASELINE, baseline, identity, _facts(reference, clip, vae, baseline, objective))


def _facts(model, clip, vae, runner: host.TrajectoryRunner, objective) -> dict:
    """Provenance, and which code makes the pictures."""
    code = {"comfyui": comfyui_version.__version__, "nodes": source_hash(Path(__file__).parent)}
    return host_scoring.graph_provenance(model, clip, vae, runner, objective) | {"code": code}


class Live:
    """Progress on the node: a bar that moves with every step, and a line of text."""

    def __init__(self, node_id: str | None, images: int, steps: int):
        self.node_id, self.steps = node_id, steps
        self.bar = comfy.utils.ProgressBar(images * steps, node_id=node_id)
        self.done = self.within = 0.0

    def step(self, arm: Arm, images: int) -> None:
        """A step of a batch of the part that makes ``images``."""
        batches = -(-images // arm.source.max_batch)
        self.within = min(self.within + images / batches, images * self.steps)
        self.bar.update_absolute(round(self.done + self.within))

    def part(self, progress: Progress) -> None:
        """A finished part; an interrupt is raised here too."""
        self.done, self.within = progress.done * self.steps, 0.0
        self.bar.update_absolute(round(self.done))
        host.progress_text(
            self.node_id, f"{progress.arm.label}: {progress.done} of {progress.total} images"
        )
        comfy.model_management.throw_exception_if_processing_interrupted()
