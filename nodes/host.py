"""The sampling side of ComfyUI's internals (0.30.0): the nodes reach them only through here."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch

from ..qsched_core.files import MOST_NAME, safe_name
from ..qsched_core.precondition import ScalarCorrection
from ..qsched_core.prompts import PromptError, PromptSet
from ..qsched_core.recent import Recent
from ..qsched_core.rollout import MEMO_BYTES, EvaluationMemo, rollout
from ..qsched_core.runner import Batches
from ..qsched_core.schedule import QSchedule, ScheduleError
from ..qsched_core.search.precheck import Observed, observed
from ..qsched_core.solvers import ModelFacts, check_sigmas, get_solver
from ..qsched_core.text import markup_free, plain, shown
from .host_encoding import encode

logger = logging.getLogger(__name__)

SCHEDULERS = comfy.samplers.SCHEDULER_NAMES
SCHEDULE_FOLDER, SCORER_FOLDER = "qsched", "clip_score"


def register_folders() -> None:
    """Make ``models/qsched`` and ``models/clip_score`` known to ComfyUI."""
    for name in (SCHEDULE_FOLDER, SCORER_FOLDER):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def schedule_files() -> list[str]:
    """Schedules in every folder registered for them, by their path inside it."""
    names = folder_paths.get_filename_list(SCHEDULE_FOLDER)
    return [name for name in names if name.lower().endswith(".json")]


def schedule_path(name: str) -> Path:
    """Where the schedule file ``name`` is; ScheduleError if there is none."""
    found = None
    if len(name) <= MOST_NAME:
        found = folder_paths.get_full_path(SCHEDULE_FOLDER, name)
    if found is None and len(name) <= MOST_NAME:  # a workflow may come from Windows
        found = folder_paths.get_full_path(SCHEDULE_FOLDER, name.replace("\\", "/"))
    if found is None or not found.lower().endswith(".json"):
        raise ScheduleError(
            f"schedule_name={shown(name)} is no schedule in models/{SCHEDULE_FOLDER}; refresh the "
            "list, or copy the file there"
        )
    return Path(found)


def new_schedule_path(name: str) -> Path:
    """Where a schedule called ``name`` is saved: the first folder that is registered.

    ScheduleError for a name that could leave it, or that not every system can hold.
    """
    root = Path(folder_paths.get_folder_paths(SCHEDULE_FOLDER)[0]).resolve()
    try:
        path = (root / safe_name(name)).resolve()
    except (ValueError, OSError) as error:
        raise ScheduleError(str(error)) from None
    if not path.is_relative_to(root):  # through a link
        raise ScheduleError(f"name={shown(name)} must stay inside {root}")
    return path


def input_file(name: str) -> Path:
    """The file called ``name`` in the input folder; PromptError if it is not there."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = None
    if name.strip() and len(name) <= MOST_NAME:
        with suppress(OSError, ValueError):  # a name that no file system can hold
            path = (root / name.strip().replace("\\", "/")).resolve()
    if path is None or not path.is_relative_to(root) or not path.is_file():
        raise PromptError(
            f"file={shown(name)} is no file in ComfyUI's input folder; copy it there and write its "
            "name"
        )
    return path


def report(node_id: str | None, text: str) -> None:
    """Say something to the user: in the log, and on the node while it runs."""
    logger.warning(plain(text))
    progress_text(node_id, text)


def progress_text(node_id: str | None, text: str) -> None:
    """Show ``text`` on the running node, where there is a server to show it.

    The page takes it for HTML: what would be a tag is escaped.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(markup_free(text), node_id)


def model_sampling(model):
    return model.get_model_object("model_sampling")


def is_flow(sampling) -> bool:
    """Whether sigma is a flow's time in [0, 1] rather than the noise's standard deviation."""
    return isinstance(sampling, comfy.model_sampling.CONST)


def sampling_facts(
    model, scheduler: str, steps: int, denoise: float = 1.0
) -> tuple[torch.Tensor, bool]:
    """Sigmas (CPU) that KSampler would use, and whether the model is a flow.

    They are ``steps`` + 1, but for schedulers that make more or fewer of some numbers of steps.
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
    if denoise > 0.9999:  # KSampler cuts nothing off then
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, int(steps / denoise))
        sigmas = sigmas[-(steps + 1) :]
    return sigmas.cpu(), is_flow(sampling)


def sigmas_of(
    schedule: QSchedule | None, model, scheduler: str, steps: int, denoise: float
) -> torch.Tensor:
    """Sigmas [steps + 1] (CPU): the schedule's own, or with a model BasicScheduler's.

    ScheduleError if neither is given; ValueError if what was asked for does not decrease.
    """
    if model is None:
        if schedule is None:
            raise ScheduleError("schedule and model are both missing; connect one of them")
        if steps not in (0, schedule.steps):
            raise ScheduleError(
                f"steps={steps} needs a model: the schedule's own noise levels are {schedule.steps} "
                "steps; connect a model, or set steps to 0"
            )
        sigmas = torch.tensor(schedule.tail(denoise))
    elif steps == 0 and schedule is None:
        raise ScheduleError("steps=0 needs a schedule, whose step count it is; set steps")
    else:
        steps = steps or schedule.steps
        sigmas, _ = sampling_facts(model, scheduler, steps, denoise)
        sigmas = sigmas[-(steps + 1) :]  # as BasicScheduler does, whatever denoise is
    check_sigmas(sigmas)
    return sigmas


def model_facts(sampling, config=None) -> ModelFacts:
    """What solvers need to know of a model, from its model_sampling object and its configuration."""
    flow = is_flow(sampling)
    return ModelFacts(
        flow,
        s_noise=float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0,
        training_sigmas=None if flow else _training_sigmas(sampling, config),
        # where ComfyUI moves a flow's sigma of 1, which has no log-SNR
        first_sigma=float(sampling.percent_to_sigma(1e-4)) if flow else None,
    )


def _training_sigmas(sampling, config) -> torch.Tensor | None:
    """Sigma of every training timestep, rising; None for a model that has no timesteps.

    ComfyUI keeps every 20th alone of a distilled (LCM) model: its table is built anew.
    """
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or len(sigmas) == getattr(sampling, "num_timesteps", len(sigmas)):
        return sigmas
    zsnr = getattr(sampling, "zsnr", None)
    return comfy.model_sampling.ModelSamplingDiscrete(config, zsnr=zsnr).sigmas


class TrajectoryRunner:
    """Images of many prompts under many corrections, through a ComfyUI MODEL, CLIP and VAE.

    Prompts and candidates share batches of at most ``max_batch`` latents (0 chooses; halved when
    memory runs out), and candidates what they have in common: ``memory`` bytes of model outputs are
    kept, and as many of encoded prompts.  Each prompt's picture is what KSampler gives for it alone
    with its seed, up to the rounding of a batched matrix product.  ``model_evaluations`` counts
    latents that went through the model.
    """

    def __init__(
        self,
        model,
        clip,
        vae,
        *,
        sigmas: torch.Tensor,
        solver: str,
        cfg: float = 1.0,
        negative: str = "",
        width: int,
        height: int,
        max_batch: int = 0,
        options: Mapping[str, float] | None = None,
        memory: int = MEMO_BYTES,
    ):
        self.options = get_solver(solver).check(dict(options or {}))
        check_sigmas(sigmas)
        self.model, self.clip, self.vae = model, clip, vae
        self.sigmas, self.solver, self.cfg, self.negative = sigmas, solver, cfg, negative
        self.facts = model_facts(model_sampling(model), model.model.model_config)
        self.latent = self._empty_latent(width, height)
        self.width, self.height = width, height
        self.batches = Batches(
            max_batch or self._batch_that_fits(),
            comfy.model_management.OOM_EXCEPTION,
            lambda: comfy.model_management.soft_empty_cache(True),
        )
        self.model_evaluations = 0
        self._encoded: Recent[list] = Recent(memory)
        self._negative: list | None = None
        self._memo = EvaluationMemo(memory)

    @property
    def max_batch(self) -> int:
        """The most latents in a batch."""
        return self.batches.max_batch

    def _empty_latent(self, width: int, height: int) -> torch.Tensor:
        latent_format = self.model.get_model_object("latent_format")
        ratio = latent_format.spacial_downscale_ratio
        for name, value in (("width", width), ("height", height)):
            if value < ratio or value % ratio:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {ratio} for this model"
                )
        latent = torch.zeros(1, latent_format.latent_channels, height // ratio, width // ratio)
        return latent.unsqueeze(2) if latent_format.latent_dimensions == 3 else latent

    def _batch_that_fits(self) -> int:
        device = self.model.load_device
        if comfy.model_management.is_device_cpu(device):
            return 32  # larger batches gain nothing on a CPU
        free = comfy.model_management.get_free_memory(device)
        batch = 128
        while batch > 1:
            shape = [batch, *self.latent.shape[1:]]
            if self.model.model.memory_required(shape) * 1.5 < free:
                break
            batch //= 2
        return batch

    def parameters(self) -> dict:
        """What fixes the pictures beside model, prompts and seeds: plain JSON."""
        return {
            "solver": self.solver,
            **({"options": self.options} if self.options else {}),
            "sigmas": [float(s) for s in self.sigmas],
            "cfg": self.cfg,
            "negative": self.negative,
            "width": self.width,
            "height": self.height,
        }

    def images(
        self, prompts: PromptSet, corrections: Sequence[ScalarCorrection], on_step=None
    ) -> torch.Tensor:
        """Pictures [candidates, prompts, height, width, 3] in [0, 1] on the CPU.

        ``on_step()`` is called after every sampling step.  An interrupt is raised between steps.
        """
        return self.batches.images(
            lambda part, few: self._images_of(part, few, on_step), prompts, corrections
        )

    def _conditioning(self, prompts: PromptSet) -> list:
        """One conditioning whose tensors hold a row a prompt."""
        found = {text: self._encoded.get(text) for text in prompts.prompts}
        for text, known in found.items():
            if known is None:
                found[text] = encode(self.clip, text)
                self._encoded.put(text, found[text], _conditioning_bytes(found[text]))
        return [_stack_conditioning([found[text] for text in prompts.prompts])]

    def _sampled(self, prompts: PromptSet, candidates: int, sample) -> torch.Tensor:
        """What ``sample`` (k-diffusion's signature) gives for every candidate of every prompt."""
        size = len(prompts)
        guider = comfy.samplers.CFGGuider(self.model)
        if self._negative is None:
            self._negative = encode(self.clip, self.negative) if self.cfg != 1.0 else []
        guider.set_conds(self._conditioning(prompts), self._negative)
        guider.set_cfg(self.cfg)
        noise = torch.cat([comfy.sample.prepare_noise(self.latent, s) for s in prompts.seeds])
        return guider.sample(
            noise.repeat(candidates, *[1] * (noise.ndim - 1)),
            self.latent.expand(candidates * size, *self.latent.shape[1:]),
            comfy.samplers.KSAMPLER(sample),
            self.sigmas,
            disable_pbar=True,
            seed=prompts.seeds[0],
        )

    def _for_decoding(self, latents: torch.Tensor) -> torch.Tensor:
        """The same latents, in the memory order in which the VAE's convolutions are fastest.

        On a CPU that is channels last, and what a convolution is given it passes on: a TAESD takes
        a fifth less time in fp32 and a quarter less in bf16, an SD VAE as long as before.
        """
        device = getattr(self.vae, "device", None)  # the latents are on the CPU in any case
        if latents.ndim == 4 and comfy.model_management.is_device_cpu(device):
            return latents.contiguous(memory_format=torch.channels_last)
        return latents

    def _images_of(self, prompts: PromptSet, corrections, on_step) -> torch.Tensor:
        candidates, size = len(corrections), len(prompts)

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            def step_done(state):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if on_step is not None:
                    on_step()

            result = rollout(
                model,
                x[:size],
                sigmas,
                corrections,
                solver=self.solver,
                facts=self.facts,
                seeds=prompts.seeds,
                options=self.options,
                samples=tuple(zip(prompts.prompts, prompts.seeds, strict=True)),
                memo=self._memo,
                extra_args=extra_args,
                callback=step_done,
            )
            self.model_evaluations += result.evaluations
            return result.latents.flatten(0, 1)

        pictures = self.vae.decode(self._for_decoding(self._sampled(prompts, candidates, sample)))
        if pictures.ndim == 5:  # a video model: its first frame
            pictures = pictures[:, 0]
        return pictures.float().cpu().clamp(0, 1).unflatten(0, (candidates, size))

    def observed(self, prompts: PromptSet, at: Observed | None = None) -> Observed:
        """The model at given latents, or along its own trajectory; all prompts are one batch."""
        found: list[Observed] = []

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            def interruptible(x, sigma, **extra):
                comfy.model_management.throw_exception_if_processing_interrupted()
                return model(x, sigma, **extra)

            found.append(
                observed(
                    interruptible,
                    x,
                    sigmas,
                    solver=self.solver,
                    facts=self.facts,
                    seeds=prompts.seeds,
                    options=self.options,
                    at=at,
                    extra_args=extra_args,
                )
            )
            return x

        self._sampled(prompts, 1, sample)
        self.model_evaluations += found[0].model_evaluations
        return found[0]


def _conditioning_bytes(rows: Sequence[list]) -> int:
    values = [value for tokens, extra in rows for value in (tokens, *extra.values())]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _stack_conditioning(rows: Sequence[list]) -> list:
    """Join single-entry conditionings of several prompts into one with a row a prompt.

    Token lengths that differ are brought to their least common multiple by repetition, as
    ComfyUI's own batching does.
    """
    if any(len(row) != 1 for row in rows):
        raise ValueError(
            "a prompt gave several conditionings; prompt schedules can't be calibrated"
        )
    lengths = [row[0][0].shape[1] for row in rows]
    length = math.lcm(*lengths)
    tokens = torch.cat(
        [row[0][0].repeat(1, length // n, 1) for row, n in zip(rows, lengths, strict=True)]
    )
    extra = dict(rows[0][0][1])
    for key, value in extra.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == (1,):
            parts = [row[0][1][key] for row in rows]
            if any(part.shape != value.shape for part in parts):
                raise ValueError(
                    f"the prompts' {key} differ in shape; use prompts of similar length, or a batch of 1"
                )
            extra[key] = torch.cat(parts)
    return [tokens, extra]
