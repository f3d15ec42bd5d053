"""Sampling nodes: a base solver corrected by a schedule."""

from __future__ import annotations

from comfy_api.latest import io

from ..qsched_core.schedule import MODES
from ..qsched_core.solvers import SOLVERS
from . import host, host_sampling
from .types import Schedule

MODE_TOOLTIP = (
    "interpolate: steps whose sigma was not learned get coefficients interpolated in log-SNR, and "
    "a schedule learned for another model or solver only warns. strict: either is an error."
)


def _mode_input():
    return io.Combo.Input(
        "mode", options=list(MODES), default=MODES[0], optional=True, tooltip=MODE_TOOLTIP
    )


class QSchedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSampler",
            display_name="Q-Sched Sampler",
            category="QSched/sampling",
            description="A few-step solver corrected by a schedule, for SamplerCustom and SamplerCustomAdvanced.",
            inputs=[
                Schedule.Input(
                    "schedule", tooltip="Coefficients from a calibrator, a file or a ramp."
                ),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    tooltip="The base solver. Coefficients are learned for one solver.",
                ),
                _mode_input(),
            ],
            outputs=[io.Sampler.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, schedule, solver, mode=MODES[0]) -> io.NodeOutput:
        return io.NodeOutput(
            host_sampling.make_sampler(schedule, solver, mode, cls.hidden.unique_id)
        )


class QSchedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedKSampler",
            display_name="KSampler (Q-Sched)",
            category="QSched/sampling",
            description="KSampler with a solver corrected by a schedule: takes its place in any graph.",
            search_aliases=["ksampler", "qsched", "few-step"],
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                Schedule.Input(
                    "schedule", tooltip="Coefficients from a calibrator, a file or a ramp."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise.",
                ),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    tooltip="The base solver. Coefficients are learned for one solver.",
                ),
                io.Combo.Input("scheduler", options=list(host.SCHEDULERS), default="simple"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the trajectory is entered in its middle, as in KSampler.",
                ),
                _mode_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, denoise=1.0):
        return True if denoise > 0 else f"denoise={denoise} must be above 0; 1 denoises fully"

    @classmethod
    def execute(
        cls, model, schedule, seed, steps, cfg, solver, scheduler, positive, negative, latent_image,
        denoise=1.0, mode=MODES[0],
    ) -> io.NodeOutput:  # fmt: skip
        latent = host_sampling.ksampler(
            model, schedule, solver, mode, cls.hidden.unique_id,
            seed=seed, steps=steps, cfg=cfg, scheduler=scheduler,
            positive=positive, negative=negative, latent=latent_image, denoise=denoise,
        )  # fmt: skip
        return io.NodeOutput(latent)


NODES = (QSchedSampler, QSchedKSampler)
