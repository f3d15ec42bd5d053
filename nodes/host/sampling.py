"""A corrected solver as ComfyUI's SAMPLER (0.30.0), and KSampler around it."""

from __future__ import annotations

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...qsched_core.correction import (
    AroundCorrection,
    CorrectedModel,
    StepCorrection,
)
from ...qsched_core.schedule import Match, QSchedule, ScheduleError
from ...qsched_core.solvers import check_sigmas, get_solver, sample_steps
from ...qsched_core.text import shown
from ...qsched_core.trajectory import Trajectory
from .progress import report
from .trajectories import AS_LEARNED, is_flow, largest_latent, levels, model_sampling, solver_info
from .weights.provenance import model_info


def make_sampler(
    schedule: QSchedule,
    solver: str,
    mode: str = "interpolate",
    node_id: str | None = None,
    note: str = "",
    **options: float,
):
    """A SAMPLER that runs ``solver`` corrected by ``schedule``; ``note`` is shown with its own.

    A schedule of several solvers runs those, each at the noise levels that are nearest to its own.

    The schedule is matched to the sigmas and to the model when sampling starts: ScheduleError if
    they do not fit (or, with ``mode`` "strict", if anything differs from what was learned).
    ``options`` are the solver's own (``get_solver(solver).options``): ValueError for one that it
    does not have, or that is out of its range.
    """
    entry, several = get_solver(solver), not schedule.trajectory.is_uniform
    entry.check(options)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guider = model.inner_model
        match = _matched(schedule, solver, options, guider, sigmas, mode, node_id, note)
        correction = match.correction
        function = guider.model_options.get("denoise_mask_function")
        if function is not None:
            correction = _ChangingMask(correction, guider, sigmas, function)
        base = guider.inner_model
        info = solver_info(base.model_sampling, base.model_config)
        if several:
            steps = [step.bind(info) for step in match.solvers]
            return sample_steps(
                steps, model, x, sigmas, extra_args, callback, correction=correction
            )
        return entry.function(
            model, x, sigmas, extra_args, callback, disable,
            correction=correction, **entry.bind(info, **options),
        )  # fmt: skip

    used = [step.solver for step in schedule.trajectory.solvers] if several else [entry]
    inpaint = {"random": True} if any(each.new_inpaint_noise for each in used) else {}
    return comfy.samplers.KSAMPLER(sample, inpaint_options=inpaint)


def make_around_sampler(
    schedule: QSchedule, sampler, mode: str = "interpolate", node_id: str | None = None
):
    """Another ``sampler``, with a model whose predictions are corrected.

    See :mod:`qsched_core.correction.around` for what that approximates; errors as :func:`make_sampler`.
    """
    return _AroundSampler(schedule, sampler, mode, node_id)


class _AroundSampler(comfy.samplers.Sampler):
    def __init__(self, schedule: QSchedule, sampler, mode: str, node_id: str | None):
        self._schedule, self._sampler = schedule, sampler
        self._mode, self._node_id = mode, node_id

    def sample(self, model_wrap, sigmas, *args, **kwargs):
        # Another solver is not reported as a difference: this node is made for any sampler.
        solver = self._schedule.solver
        correction = _matched(
            self._schedule, solver, _options_of(self._sampler, solver), model_wrap, sigmas,
            self._mode, self._node_id, own_solvers=False,
        ).correction  # fmt: skip
        around = AroundCorrection.of(sigmas.tolist(), correction)
        return self._sampler.sample(CorrectedModel(model_wrap, around), sigmas, *args, **kwargs)

    def max_denoise(self, model_wrap, sigmas):
        return self._sampler.max_denoise(model_wrap, sigmas)


class _ChangingMask:
    """A correction whose mask changes from step to step, as ComfyUI computes it from sigma.

    Differential diffusion keeps each pixel given up to a step of its own.  A given pixel is not
    corrected.
    """

    def __init__(self, correction: StepCorrection, guider, sigmas: torch.Tensor, function):
        self._correction, self._guider = correction, guider
        self._sigmas, self._function = sigmas, function

    def _mask(self, step: int, mask):
        if mask is None:
            return None
        extra = {"model": self._guider, "sigmas": self._sigmas}
        return self._function(self._sigmas[step].reshape(1), mask, extra_options=extra)

    def __call__(self, step, x, denoised, mask=None):
        return self._correction(step, x, denoised, self._mask(step, mask))

    def intermediate(self, step, x, denoised, mask=None):
        return self._correction.intermediate(step, x, denoised, self._mask(step, mask))


def _matched(
    schedule: QSchedule,
    solver: str,
    options,
    guider,
    sigmas: torch.Tensor,
    mode: str,
    node_id,
    note: str = "",
    own_solvers: bool = True,
) -> Match:
    """The schedule at ``sigmas``; ``own_solvers``: several are run, not another sampler.

    What differs from what was learned is reported to the user; in mode "strict" it is a
    ScheduleError.  A ramp made by hand belongs to no noise levels: that its coefficients are
    interpolated is no difference.
    """
    several = not schedule.trajectory.is_uniform
    if several or not schedule.is_identity:
        schedule.check_flow(is_flow(guider.inner_model.model_sampling))
    differences = differences_of(schedule, solver, options, guider.model_patcher)
    if differences and mode == "strict":
        raise ScheduleError(f"{differences}; calibrate again, or set mode to 'interpolate'")
    check_sigmas(sigmas)
    match = schedule.at(sigmas.tolist(), mode)
    by_hand = schedule.provenance.get("source") == "ramp"
    found = [differences, "" if by_hand else match.note]
    if schedule.replaced_sigmas is not None and match.note:
        found.append(
            f"the noise levels of this schedule were learned too, and are not those here; set the "
            f"scheduler to {AS_LEARNED!r}, or take them from Q-Sched Sigmas"
        )
    nothing_learned = schedule.is_identity and schedule.replaced_sigmas is None and not several
    said = note or f"{len(sigmas) - 1} steps"
    if several and own_solvers:
        said += f"; solvers as learned: {', '.join(step.label for step in match.solvers)}"
    report(node_id, [] if nothing_learned else found, said)
    return match


def _options_of(sampler, solver: str) -> dict[str, float] | None:
    """The options that ``sampler`` runs ``solver`` with; None if it is another solver or unknown."""
    named = {"ddim": "euler"}.get(solver, solver)  # ComfyUI's ddim has no eta: it is Euler's step
    function = getattr(k_diffusion, f"sample_{named}", None)
    if function is None or getattr(sampler, "sampler_function", None) is not function:
        return None
    known = {option.name for option in get_solver(solver).options}
    return {k: v for k, v in sampler.extra_options.items() if k in known}


def differences_of(schedule: QSchedule, solver: str, options, model) -> str:
    """How this use differs from what the schedule was learned for, in words; empty if it does not.

    ``options`` None: the solver's options are unknown and not compared.  A schedule of several solvers
    runs its own.
    """
    parts = []
    if schedule.trajectory.is_uniform:
        parts += filter(None, [schedule.trajectory.differences(solver, options)])
    learned = schedule.provenance.get("model")
    if isinstance(learned, dict):
        found = model_info(model)
        for key, label in (("format", "weight format"), ("source_hash", "model")):
            if learned.get(key) and found.get(key) and learned[key] != found[key]:
                name = {"source_hash": "source"}.get(key, key)
                parts.append(
                    f"{label} {shown(learned.get(name) or learned[key])}, "
                    f"not {shown(found.get(name) or found[key])}"
                )
        before, now = _loras(learned), _loras(found)
        if "patches" in learned and before != now:
            parts.append(f"LoRAs {before or 'none'}, not {now or 'none'}")
    return f"this schedule was learned for {'; '.join(parts)}" if parts else ""


def _loras(info) -> str:
    """Short hashes of a model's LoRAs, both the patches and those merged into its weights; "" if none."""
    found = {str(info.get(key) or "")[:8] for key in ("patches", "merged_patches")}
    return " and ".join(sorted(found - {""}))


def ksampler(
    model, schedule, solver, mode, node_id, *, seed, steps, cfg, scheduler, positive, negative, latent,
    denoise=1.0, start=0, end=None, add_noise=True, leftover_noise=False, options=None,
):  # fmt: skip
    """KSampler with a corrected solver: the LATENT dict it returns is KSampler's own.

    Without a schedule c is 1; the scheduler may be ``AS_LEARNED``.  Steps ``start`` to ``end`` of the trajectory are made; without ``leftover_noise`` the last of
    them goes to sigma 0, as in ComfyUI's advanced KSampler.
    """
    image = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio_")}
    largest = largest_latent(model)
    if largest and max(image.shape[-2:]) > largest:
        ratio = model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = (size * ratio for size in image.shape[-2:])
        raise ScheduleError(
            f"latent_image={width} x {height} is more than this model knows; make it at most "
            f"{largest * ratio} x {largest * ratio}"
        )
    sigmas, note = levels(schedule, model, scheduler, steps, denoise)
    if schedule is None:
        note = "; ".join(text for text in ("no schedule: the plain solver, c = 1", note) if text)
        flow = is_flow(model_sampling(model))
        check_sigmas(sigmas)
        schedule = QSchedule.identity(Trajectory.of(sigmas.tolist(), solver, flow))
    if end is not None and end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1].clone()
        if not leftover_noise:
            sigmas[-1] = 0
    if start >= len(sigmas) - 1:  # no step to make: ComfyUI returns the latent unchanged
        return out | {"samples": image}
    sigmas = sigmas[start:]
    if add_noise:
        noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    else:
        noise = torch.zeros(image.size(), dtype=image.dtype, layout=image.layout, device="cpu")
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        make_sampler(schedule, solver, mode, node_id, note, **(options or {})),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return out | {"samples": samples}
