"""Noise levels as ComfyUI (0.30.0) gives them, and what solvers need to know of its models."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_sampling
import comfy.samplers
import torch

from ...qsched_core.schedule import QSchedule, ScheduleError
from ...qsched_core.solvers import ModelInfo, check_sigmas, get_solver
from ...qsched_core.text import shown
from ...qsched_core.trajectory import Trajectory

SCHEDULERS = comfy.samplers.SCHEDULER_NAMES
AS_LEARNED = "as learned"  # in a scheduler's place: the schedule's own steps and noise levels


def model_sampling(model):
    return model.get_model_object("model_sampling")


def largest_latent(model) -> int | None:
    """Rows or columns that a latent may have at most; None where the model sets no bound.

    ComfyUI's MMDiT has a table of positions, and fails beyond it with a bare assertion.
    """
    network = model.get_model_object("diffusion_model")
    positions = getattr(network, "pos_embed_max_size", None)
    if positions is None or getattr(network, "pos_embed", None) is None:
        return None
    return positions * network.x_embedder.patch_size[0]


def is_flow(sampling) -> bool:
    """Whether sigma is a flow's time in [0, 1] rather than the noise's standard deviation."""
    return isinstance(sampling, comfy.model_sampling.CONST)


def sigmas_and_flow(
    model, scheduler: str, steps: int, denoise: float = 1.0
) -> tuple[torch.Tensor, bool]:
    """Sigmas (CPU) that KSampler would use, and whether the model is a flow.

    Most schedulers give ``steps`` + 1 sigmas; for some step counts a few give more or fewer.
    """
    if scheduler not in SCHEDULERS:
        raise ScheduleError(
            f"scheduler={shown(scheduler)} is unknown; choose one of {', '.join(SCHEDULERS)}"
        )
    if steps < 1:
        raise ScheduleError(f"steps={steps} must be at least 1")
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise={denoise} must be above 0 and at most 1")
    sampling = model_sampling(model)
    if denoise > 0.9999:  # as in KSampler, which takes this for a full denoise
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, int(steps / denoise))
        sigmas = sigmas[-(steps + 1) :]
    return sigmas.cpu(), is_flow(sampling)


def levels(
    schedule: QSchedule | None, model, scheduler: str, steps: int, denoise: float
) -> tuple[torch.Tensor, str]:
    """Sigmas (CPU) of a KSampler with a schedule, and what is to be said of them.

    ``AS_LEARNED`` takes the schedule's own, whatever ``steps`` is; below ``denoise`` 1 the last
    ones.  ScheduleError where a model of the other kind is to take them; else errors as :func:`sigmas_and_flow`.
    """
    if scheduler != AS_LEARNED:
        return sigmas_and_flow(model, scheduler, steps, denoise)[0], ""
    if schedule is None:
        note = f"nothing was learned: {steps} steps of the scheduler {SCHEDULERS[0]}"
        return sigmas_and_flow(model, SCHEDULERS[0], steps, denoise)[0], note
    schedule.check_flow(is_flow(model_sampling(model)))
    sigmas = torch.tensor(schedule.tail(denoise))
    return sigmas, f"{len(sigmas) - 1} steps and their noise levels as learned"


def sigmas_of(
    schedule: QSchedule | None, model, scheduler: str, steps: int | None, denoise: float
) -> torch.Tensor:
    """Sigmas [steps + 1] (CPU): the schedule's own; with a model those of BasicScheduler.

    ``steps`` None is as many as the schedule has.
    ScheduleError if neither is given; ValueError if what was asked for does not decrease.
    """
    if model is None:
        if schedule is None:
            raise ScheduleError("schedule and model are both missing; connect one of them")
        if steps not in (None, schedule.steps):
            raise ScheduleError(
                f"steps={steps} needs a model: the schedule's own noise levels are {schedule.steps} "
                "steps; connect a model, or set steps to those of the schedule"
            )
        sigmas = torch.tensor(schedule.tail(denoise))
    elif steps is None and schedule is None:
        raise ScheduleError(
            "steps is as the schedule, but there is none; connect one, or set steps to a number"
        )
    else:
        steps = steps or schedule.steps
        sigmas, _ = sigmas_and_flow(model, scheduler, steps, denoise)
        sigmas = sigmas[-(steps + 1) :]  # as BasicScheduler does, whatever denoise is
    check_sigmas(sigmas)
    return sigmas


def solver_info(sampling, config=None) -> ModelInfo:
    """What solvers need to know of a model, from its model_sampling object and its configuration."""
    flow = is_flow(sampling)
    return ModelInfo(
        flow,
        s_noise=float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0,
        training_sigmas=None if flow else _training_sigmas(sampling, config),
        # A flow's sigma of 1 has no log-SNR: ComfyUI replaces it by this one.
        first_sigma=float(sampling.percent_to_sigma(1e-4)) if flow else None,
    )


def _training_sigmas(sampling, config) -> torch.Tensor | None:
    """Sigma of every training timestep, rising; None for a model that has no timesteps.

    Of a distilled (LCM) model ComfyUI keeps only every 20th.  For it the full table is built anew.
    """
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or len(sigmas) == getattr(sampling, "num_timesteps", len(sigmas)):
        return sigmas
    zsnr = getattr(sampling, "zsnr", None)
    return comfy.model_sampling.ModelSamplingDiscrete(config, zsnr=zsnr).sigmas


def trajectory_of(
    model, solver: str, scheduler: str, steps: int, options: Mapping[str, float] | None = None
) -> Trajectory:
    """The trajectory that KSampler would run, with all options of its solver filled in.

    ScheduleError for what can't be sampled; ValueError for an option the solver does not have.
    """
    sigmas, flow = sigmas_and_flow(model, scheduler, steps)
    chosen = get_solver(solver).check(dict(options or {}))
    return Trajectory.of(sigmas.tolist(), solver, flow, chosen)
