"""Pictures from a ComfyUI (0.30.0) MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...qsched_core.prompts import PromptSet
from ...qsched_core.schedule import ScheduleError
from ...qsched_core.source import ModelSource, SourceError
from ...qsched_core.trajectory import MEMO_BYTES, Trajectory
from .encoding import encode
from .trajectories import largest_latent, model_sampling, solver_info, trajectory_of
from .weights.provenance import clip_hash, model_info, vae_hash


class ComfySource(ModelSource):
    """Each prompt's picture is the one that KSampler makes for this prompt and seed alone.

    With the ``scheduler`` that gave the trajectory, finer paths have its levels too.  The free memory decides the batch, at most 128 latents.  ``memory`` bytes of model outputs are
    kept.  SourceError for a size that the model can't have.  The user's interrupt is raised between
    steps.
    """

    def __init__(
        self,
        model,
        clip,
        vae,
        trajectory: Trajectory,
        *,
        cfg: float = 1.0,
        negative: str = "",
        width: int,
        height: int,
        memory: int = MEMO_BYTES,
        scheduler: str | None = None,
    ):
        self.scheduler = scheduler
        self.model, self.clip, self.vae = model, clip, vae
        self.cfg, self.negative = cfg, negative
        self.latent = self._empty_latent(width, height)
        super().__init__(
            trajectory,
            solver_info(model_sampling(model), model.model.model_config),
            width=width,
            height=height,
            max_batch=self._batch_that_fits(),
            memory=memory,
            out_of_memory=comfy.model_management.OOM_EXCEPTION,
            relieve=lambda: comfy.model_management.soft_empty_cache(True),
        )
        self._negative: list | None = None
        # Called with each prompt that is encoded, or was: a large text encoder takes its time.
        self.on_encoded: Callable[[str], None] = lambda text: None

    def _empty_latent(self, width: int, height: int) -> torch.Tensor:
        latent_format = self.model.get_model_object("latent_format")
        if latent_format.latent_dimensions < 2:
            raise SourceError("this model makes no pictures; connect a model that does")
        ratio = latent_format.spacial_downscale_ratio
        check_size({"width": width, "height": height}, ratio, largest_latent(self.model))
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

    def describe(self) -> dict:
        return self._description

    @cached_property
    def _description(self) -> dict:
        trajectory = self.trajectory.describe()
        trajectory.pop("flow")
        if not trajectory.get("options", True):
            trajectory.pop("options")
        return {
            "model": model_info(self.model),
            "clip_hash": clip_hash(self.clip),
            "vae_hash": vae_hash(self.vae),
            "sampling": {
                **trajectory,
                "cfg": self.cfg,
                "negative": self.negative,
                "width": self.width,
                "height": self.height,
            },
        }

    def fine(self, steps: int) -> Trajectory:
        """The scheduler's own levels for so many steps; ScheduleError where it gives others."""
        if self.scheduler is None:
            return super().fine(steps)
        trajectory = trajectory_of(self.model, "euler", self.scheduler, steps)
        if trajectory.steps != steps:
            raise ScheduleError(
                f"scheduler={self.scheduler} gives {trajectory.steps} steps when asked for {steps}; "
                "choose another scheduler, or another level_grid"
            )
        return trajectory

    def interrupted(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def alike(self, prompts: PromptSet) -> list[list[int]]:
        """By the conditioning: T5 and language models give a token for each of the prompt's."""
        found: dict[Hashable, list[int]] = {}
        for place, text in enumerate(prompts.prompts):
            found.setdefault(_signature(self._encoded(text)), []).append(place)
        return list(found.values())

    def _conditioning(self, prompts: PromptSet) -> list:
        """One conditioning for all prompts: its tensors have a row for each prompt."""
        return [_stack_conditioning([self._encoded(text) for text in prompts.prompts])]

    def _encoded(self, text: str) -> list:
        self.interrupted()
        found = encode(self.clip, text)
        self.on_encoded(text)
        return found

    def sample(self, prompts: PromptSet, trajectory: Trajectory, copies: int, run) -> torch.Tensor:
        size = len(prompts)

        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return run(model, x[:size], sigmas, extra_args)

        guider = comfy.samplers.CFGGuider(self.model)
        if self._negative is None:
            self._negative = encode(self.clip, self.negative) if self.cfg != 1.0 else []
        guider.set_conds(self._conditioning(prompts), self._negative)
        guider.set_cfg(self.cfg)
        noise = torch.cat([comfy.sample.prepare_noise(self.latent, s) for s in prompts.seeds])
        return guider.sample(
            noise.repeat(copies, *[1] * (noise.ndim - 1)),
            self.latent.expand(copies * size, *self.latent.shape[1:]),
            comfy.samplers.KSAMPLER(sampler),
            torch.tensor(trajectory.sigmas),
            disable_pbar=True,
            seed=prompts.seeds[0],
        )

    def _for_decoding(self, latents: torch.Tensor) -> torch.Tensor:
        """The same latents, in the memory order in which the VAE's convolutions are fastest.

        On a CPU that is channels last, and convolutions keep the order that they are given.  A TAESD
        takes a fifth less time in fp32 and a quarter less in bf16; an SD VAE takes as long as before.
        """
        device = getattr(self.vae, "device", None)  # the latents are on the CPU in any case
        if latents.ndim == 4 and comfy.model_management.is_device_cpu(device):
            return latents.contiguous(memory_format=torch.channels_last)
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pictures = self.vae.decode(self._for_decoding(latents))
        return pictures[:, 0] if pictures.ndim == 5 else pictures  # a video: its first frame


def check_size(sides: Mapping[str, int], ratio: int, largest: int | None) -> None:
    """SourceError, naming the nearest sizes, for sides in pixels that a model can't have.

    ``ratio`` is the pixels of a latent's row or column, ``largest`` how many of these there may be.
    A model that works on patches of latents needs no more: ComfyUI fills the last patch.
    """
    for name, value in sides.items():
        if largest and value > largest * ratio:
            raise SourceError(
                f"{name}={value} is more than this model knows; set at most {largest * ratio}"
            )
        if value < ratio or value % ratio:
            near = sorted({max(1, value // ratio) * ratio, (value // ratio + 1) * ratio})
            raise SourceError(
                f"{name}={value} must be a multiple of {ratio} for this model; set it to "
                f"{' or '.join(map(str, near))}"
            )


def _signature(row: list) -> Hashable:
    """What conditionings must have in common to be rows of one: shapes, and settings of the model."""
    if len(row) != 1:
        raise ValueError(
            "a prompt gave several conditionings; prompt schedules can't be calibrated"
        )
    tokens, extra = row[0]
    return (tokens.shape[1:], *((key, _kind(extra[key])) for key in sorted(extra)))


def _kind(value: Any) -> Hashable:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)


def _stack_conditioning(rows: Sequence[list]) -> list:
    """Conditionings of one signature as one, with a row for each prompt.

    ComfyUI batches tokens of several lengths by repeating them up to a common multiple.  That
    changes the picture of every model whose picture attends to text and to itself at once.
    """
    extra = dict(rows[0][0][1])
    for key, value in extra.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == (1,):
            extra[key] = torch.cat([row[0][1][key] for row in rows])
    return [torch.cat([row[0][0] for row in rows]), extra]
