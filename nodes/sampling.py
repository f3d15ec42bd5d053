"""Sampling nodes: a base solver corrected by a schedule."""

from __future__ import annotations

from comfy_api.latest import io

from ..qsched_core.schedule import MODES
from ..qsched_core.solvers import SOLVERS
from .choices import own_inputs
from .host.remember import remember
from .host.sampling import ksampler, make_around_sampler, make_sampler
from .host.trajectories import AS_LEARNED, SCHEDULERS
from .inputs import cfg_input, checked_options, option_inputs, with_options
from .types import Schedule
from .wired import wired

HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]
MODE_TOOLTIP = (
    "interpolate: steps whose sigma was not learned get coefficients interpolated in log-SNR, and "
    "a schedule learned for another model or solver only warns. strict: either is an error."
)


def _mode_input():
    return io.Combo.Input(
        "mode", options=list(MODES), default=MODES[0], optional=True, tooltip=MODE_TOOLTIP
    )


def _schedule_input():
    return Schedule.Input("schedule", tooltip="Coefficients from a calibrator, a file or a ramp.")


def _optional_schedule():
    """Appended last: sockets of a saved workflow are found by name."""
    return Schedule.Input(
        "schedule",
        optional=True,
        tooltip="Coefficients from a calibrator, a file or a ramp. Without it: the plain solver.",
    )


def _solver_input():
    return io.Combo.Input(
        "solver",
        options=list(SOLVERS),
        tooltip="The base solver. Coefficients are learned for one solver.",
    )


def _seed_input(name: str):
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The seed of the noise.",
    )


def _trajectory_inputs() -> list:
    return [
        io.Int.Input(
            "steps",
            default=4,
            min=1,
            max=1000,
            tooltip="Sampling steps; those of the schedule where the scheduler is as learned.",
        ),
        cfg_input(),
        _solver_input(),
        io.Combo.Input(
            "scheduler",
            options=[*SCHEDULERS, AS_LEARNED],
            default=AS_LEARNED,
            tooltip=(
                "as learned: the steps and the noise levels of the schedule, whatever steps says. "
                "Any other makes as many steps as steps says."
            ),
        ),
        io.Conditioning.Input("positive", tooltip="What the picture shall show."),
        io.Conditioning.Input(
            "negative", tooltip="What it shall not show; it has no effect at cfg 1."
        ),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
    ]


class QSchedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSampler",
            display_name="Q-Sched Sampler",
            category="QSched/sampling",
            search_aliases=["sampler", "lcm", "tcd", "pcm", "few-step", "turbo", "custom sampler"],
            description="A few-step solver corrected by a schedule, for SamplerCustom and SamplerCustomAdvanced.",
            inputs=[
                _schedule_input(),
                _solver_input(),
                _mode_input(),
                *option_inputs(),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,
        )

    @classmethod
    @with_options
    @wired("schedule")
    def execute(cls, schedule, solver, mode=MODES[0], options=None) -> io.NodeOutput:
        chosen = checked_options(solver, options)
        return io.NodeOutput(make_sampler(schedule, solver, mode, cls.hidden.unique_id, **chosen))


class QSchedAroundSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedAroundSampler",
            display_name="Q-Sched Around Sampler",
            category="QSched/sampling",
            search_aliases=["res_2m", "any sampler", "wrap sampler", "few-step", "turbo"],
            description="Any other sampler, with the model's answers corrected by a schedule: exact for "
            "Euler, an approximation for the rest.",
            inputs=[
                _schedule_input(),
                io.Sampler.Input("sampler", tooltip="A sampler of ComfyUI's or of another pack."),
                _mode_input(),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @wired("schedule", "sampler")
    def execute(cls, schedule, sampler, mode=MODES[0]) -> io.NodeOutput:
        return io.NodeOutput(make_around_sampler(schedule, sampler, mode, cls.hidden.unique_id))


class QSchedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedKSampler",
            display_name="KSampler (Q-Sched)",
            category="QSched/sampling",
            description="KSampler with a solver corrected by a schedule: takes its place in any graph.",
            search_aliases=[
                "ksampler",
                "qsched",
                "few-step",
                "lcm",
                "tcd",
                "turbo",
                "lightning",
                "schnell",
                "hyper-sd",
                "pcm",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                _seed_input("seed"),
                *_trajectory_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the trajectory is entered in its middle, as in KSampler.",
                ),
                _mode_input(),
                *option_inputs(),
                _optional_schedule(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
            hidden=HIDDEN,
            accept_all_inputs=True,
        )

    @classmethod
    @own_inputs
    def validate_inputs(cls, denoise=1.0):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        if denoise is not None and denoise <= 0:
            return f"denoise={denoise} must be above 0; 1 denoises fully"
        return True

    @classmethod
    @with_options
    @wired("model", "schedule")
    def execute(
        cls, model, seed, steps, cfg, solver, scheduler, positive, negative, latent_image,
        denoise=1.0, mode=MODES[0], schedule=None, options=None,
    ) -> io.NodeOutput:  # fmt: skip
        latent = ksampler(
            model, schedule, solver, mode, cls.hidden.unique_id,
            seed=seed, steps=steps, cfg=cfg, scheduler=scheduler,
            positive=positive, negative=negative, latent=latent_image, denoise=denoise,
            options=checked_options(solver, options),
        )  # fmt: skip
        hidden = cls.hidden
        remember(schedule, hidden.prompt, hidden.extra_pnginfo, hidden.unique_id)
        return io.NodeOutput(latent)


class QSchedKSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedKSamplerAdvanced",
            display_name="KSampler Advanced (Q-Sched)",
            category="QSched/sampling",
            search_aliases=["ksampler advanced", "few-step", "lcm", "tcd", "refiner", "turbo"],
            description="KSampler (Advanced) with a solver corrected by a schedule: some steps of a "
            "trajectory, with or without fresh noise.",
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                io.Combo.Input(
                    "add_noise",
                    options=["enable", "disable"],
                    tooltip="disable: the latent is noisy already, from an earlier node.",
                ),
                _seed_input("noise_seed"),
                *_trajectory_inputs(),
                io.Int.Input(
                    "start_at_step", default=0, min=0, max=10000, tooltip="The first step is 0."
                ),
                io.Int.Input(
                    "end_at_step",
                    default=10000,
                    min=0,
                    max=10000,
                    tooltip="The step before which to end; more than there are: the last.",
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    tooltip="enable: keep the noise that is left where the steps end early, for "
                    "another node to go on.",
                ),
                _mode_input(),
                *option_inputs(),
                _optional_schedule(),
            ],
            outputs=[io.Latent.Output(tooltip="The latent after the last of the steps.")],
            hidden=HIDDEN,
            accept_all_inputs=True,
        )

    @classmethod
    @with_options
    @wired("model", "schedule")
    def execute(
        cls, model, add_noise, noise_seed, steps, cfg, solver, scheduler, positive,
        negative, latent_image, start_at_step, end_at_step, return_with_leftover_noise,
        mode=MODES[0], schedule=None, options=None,
    ) -> io.NodeOutput:  # fmt: skip
        latent = ksampler(
            model, schedule, solver, mode, cls.hidden.unique_id,
            seed=noise_seed, steps=steps, cfg=cfg, scheduler=scheduler,
            positive=positive, negative=negative, latent=latent_image,
            start=start_at_step, end=end_at_step, add_noise=add_noise == "enable",
            leftover_noise=return_with_leftover_noise == "enable",
            options=checked_options(solver, options),
        )  # fmt: skip
        hidden = cls.hidden
        remember(schedule, hidden.prompt, hidden.extra_pnginfo, hidden.unique_id)
        return io.NodeOutput(latent)


NODES = (QSchedSampler, QSchedAroundSampler, QSchedKSampler, QSchedKSamplerAdvanced)
