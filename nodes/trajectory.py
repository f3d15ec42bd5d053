"""What nodes share that run a trajectory and score its pictures: inputs and the runner."""

from __future__ import annotations

from comfy_api.latest import io

from ..qsched_core import objective as jaq
from ..qsched_core.rollout import MEMO_BYTES
from ..qsched_core.scorers import ScorerError
from ..qsched_core.solvers import SOLVERS
from . import host
from .types import Objective, Prompts


def trajectory_inputs() -> list:
    """The inputs that say which trajectory is run: the same for every node that makes images."""
    return [
        io.Model.Input("model", tooltip="The model, quantized or not."),
        io.Clip.Input("clip"),
        io.Vae.Input("vae"),
        Prompts.Input("prompts"),
        Objective.Input("objective"),
        io.Combo.Input("solver", options=list(SOLVERS), tooltip="The base solver."),
        io.Combo.Input("scheduler", options=list(host.SCHEDULERS), default="simple"),
        io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01),
        io.Int.Input("width", default=512, min=16, max=16384, step=8),
        io.Int.Input("height", default=512, min=16, max=16384, step=8),
    ]


def negative_input():
    return io.String.Input(
        "negative",
        default="",
        multiline=True,
        optional=True,
        tooltip="Negative prompt; it has no effect at cfg 1.",
    )


def objective_and_runner(
    model, clip, vae, objective, solver, scheduler, steps, cfg, width, height, negative, options,
    memory=MEMO_BYTES,
):  # fmt: skip
    """The sigmas, whether they are a flow's, and the runner of a trajectory."""
    if not isinstance(objective, jaq.Objective):
        raise ScorerError(f"objective={objective!r} must come from a JAQ Objective node")
    sigmas, flow = host.sampling_facts(model, scheduler, steps)
    runner = host.TrajectoryRunner(
        model, clip, vae, sigmas=sigmas, solver=solver, cfg=cfg, negative=negative,
        width=width, height=height, options=options, memory=memory,
    )  # fmt: skip
    return sigmas, flow, runner
