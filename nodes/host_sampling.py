"""A corrected solver as ComfyUI's SAMPLER, and KSampler around it."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from ..qsched_core.schedule import QSchedule, ScheduleError
from ..qsched_core.solvers import check_sigmas, get_solver
from .host import model_facts, report, sampling_facts


def make_sampler(
    schedule: QSchedule,
    solver: str,
    mode: str = "interpolate",
    node_id: str | None = None,
    **options: float,
):
    """A SAMPLER that runs ``solver`` corrected by ``schedule``.

    The schedule is matched to the sigmas and to the model when sampling starts: ScheduleError if
    they do not fit (or, with ``mode`` "strict", if anything differs from what was learned).
    ``options`` are the solver's own (``get_solver(solver).options``): ValueError for one that it
    does not have, or that is out of its range.
    """
    entry = get_solver(solver)
    entry.check(options)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guider = model.inner_model
        sampling = guider.inner_model.model_sampling
        facts = model_facts(sampling)
        if facts.flow != schedule.flow and not schedule.is_identity:
            learned, found = ("flow", "epsilon") if schedule.flow else ("epsilon", "flow")
            raise ScheduleError(
                f"the schedule was learned for a {learned} model but this is a {found} model; "
                "calibrate it for this model"
            )
        differences = _differences(schedule, solver, guider.model_patcher)
        if differences and mode == "strict":
            raise ScheduleError(f"{differences}; calibrate again, or set mode to 'interpolate'")
        check_sigmas(sigmas)
        match = schedule.at(sigmas.tolist(), mode)
        for text in (differences, match.note):
            if text and not schedule.is_identity:
                report(node_id, text)
        return entry.function(
            model, x, sigmas, extra_args, callback, disable,
            correction=match.correction, **entry.bind(facts, **options),
        )  # fmt: skip

    inpaint = {"random": True} if entry.new_inpaint_noise else {}
    return comfy.samplers.KSAMPLER(sample, inpaint_options=inpaint)


def _differences(schedule: QSchedule, solver: str, model) -> str:
    """What the schedule was learned for and is not used with, in words; empty if nothing."""
    from .host_loading import model_info

    parts = []
    if solver != schedule.solver:
        parts.append(f"solver {schedule.solver!r}, not {solver!r}")
    learned = schedule.provenance.get("model")
    if isinstance(learned, dict):
        found = model_info(model)
        for key, label in (("format", "weight format"), ("source_hash", "model")):
            if learned.get(key) and found.get(key) and learned[key] != found[key]:
                name = {"source_hash": "source"}.get(key, key)
                parts.append(
                    f"{label} {learned.get(name) or learned[key]!r}, not {found.get(name) or found[key]!r}"
                )
    return f"this schedule was learned for {'; '.join(parts)}" if parts else ""


def ksampler(
    model, schedule, solver, mode, node_id, *, seed, steps, cfg, scheduler, positive, negative, latent, denoise,
    **options: float,
):  # fmt: skip
    """KSampler with a corrected solver: the LATENT dict it returns is KSampler's own."""
    image = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    sigmas, _ = sampling_facts(model, scheduler, steps, denoise)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        make_sampler(schedule, solver, mode, node_id, **options),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio_")}
    return out | {"samples": samples}
