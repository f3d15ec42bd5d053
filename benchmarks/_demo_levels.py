"""Learned noise levels on the demo's model: what they gain on prompts that no search saw."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch

from demo.build import weights_dir
from demo.prompts import demo_prompts
from demo.task import full, make
from demo.text import context_of, tokenize
from qsched_core.calibration import CalibrationResult, calibrate
from qsched_core.objective import Objective
from qsched_core.prompts import CalibrationPrompts
from qsched_core.scorers.open_clip import load_file
from qsched_core.search import CalibrationSettings
from qsched_core.study import StudyPlace
from qsched_core.task import Task, TaskSource
from qsched_core.trajectory import Candidate

from ._common import BenchRow, machine

SHIFT, FINE = 3, 32
HELDOUT = 96
CASES = (("2", 2, 1.0), ("3", 3, 1.0), ("cfg", 3, 3.0))
FORMATS = ("int2", "nf4")


def levels_of(steps: int) -> tuple[float, ...]:
    """ComfyUI's scheduler "simple" at the demo's shift."""
    shares = [1 - k / steps for k in range(steps + 1)]
    return tuple(SHIFT * share / (1 + (SHIFT - 1) * share) for share in shares)


def guided(task: Task, cfg: float) -> Task:
    """The task at a guidance scale, against the empty prompt."""
    if cfg == 1:
        return task
    nothing = context_of(tokenize([""]))

    def denoise(x, sigma, context):
        bare = task.denoise(x, sigma, context=nothing.expand(len(x), *nothing.shape[1:]))
        return bare + cfg * (task.denoise(x, sigma, context=context) - bare)

    provenance = {**task.provenance, "cfg": cfg}
    return replace(task, denoise=denoise, provenance=provenance)


def distances(result: CalibrationResult, source: TaskSource, reference: TaskSource, prompts):
    """Root mean square of pictures' differences to the unquantized model's 32 steps: before, after."""
    few = prompts.part(0, 48)
    pair = [result.baseline.candidate, result.best]
    made = source.images(few, pair)
    wanted = reference.images(few, [Candidate.identity(reference.fine(FINE))])[0]
    return [float((each - wanted).square().mean(dim=(1, 2, 3)).sqrt().mean()) for each in made]


def learned(name: str, steps: int, cfg: float, form: str, objective: Objective) -> BenchRow:
    sets, device = demo_prompts(), torch.device("cpu")
    prompts = CalibrationPrompts.of(sets.calibration, sets.test[:HELDOUT])
    source, reference = (
        TaskSource(guided(task, cfg))
        for task in (
            make(form, device, levels_of(steps)),
            full(device, levels_of(steps)),
        )
    )
    settings = CalibrationSettings("levels-dp", guard=False)
    with tempfile.TemporaryDirectory() as folder:
        result = calibrate(source, objective, prompts, settings, StudyPlace(folder), reference)
    before, after = (s.mean() for s in (result.heldout_before, result.heldout_after))
    apart = distances(result, source, reference, prompts.heldout)
    control = "" if result.control is None else f"; {result.control.text}"
    levels = ", ".join(f"{sigma:.3g}" for sigma in result.best.trajectory.sigmas)
    said = (
        f"levels-dp on {form}, {steps} steps, cfg {cfg:g}: levels {levels}; held-out gain "
        f"{result.heldout or 'none, c = 1 won the search'}; distance to 32 unquantized steps "
        f"{apart[1]:.4f}, before {apart[0]:.4f}{control}"
    )
    return BenchRow(
        f"demo.{name}.{form}", said, after, before, after / before, "JAQ", HELDOUT, machine()
    )


def rows() -> list[BenchRow]:
    objective = Objective(load_file(weights_dir() / "scorer.safetensors"))
    return [learned(*case, form, objective) for case in CASES for form in FORMATS]
