"""Prompts of unequal length in one batch: each gives the picture that KSampler gives for it alone."""

from __future__ import annotations

import importlib
from collections import Counter

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from families import FLUX_DEV, FLUX_SCHNELL, SD3, SD15, SDXL, WAN, Small

comfy_sample = importlib.import_module("comfy.sample")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
candidates = importlib.import_module("qsched_pack.qsched_core.trajectory")
sources = importlib.import_module("qsched_pack.nodes.host.source")
blocks = importlib.import_module("qsched_pack.qsched_core.rounding.blocks")
states = importlib.import_module("qsched_pack.qsched_core.rounding.states")

STEPS, CFG = 2, 2.0
PROMPTS = prompt_sets.PromptSet(("12 a", "20 b", "12 c", "7 d"), (11, 12, 13, 14))
KINDS = (SD15, SDXL, SD3, FLUX_SCHNELL, FLUX_DEV, WAN)


class Encoder:
    """A text encoder that gives as many tokens as the prompt's first word says."""

    def __init__(self, small: Small, masked: bool = False):
        self.small, self.masked = small, masked

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        count = int((text or "9 ").split()[0])
        random = torch.Generator().manual_seed(sum(text.encode()))
        ((tokens, extra),) = self.small.conditioning()
        extra = dict(extra)
        if "pooled_output" in extra:
            extra["pooled_output"] = torch.randn(extra["pooled_output"].shape, generator=random)
        if self.masked:
            extra["attention_mask"] = torch.ones(1, count)
        return [[torch.randn(1, count, tokens.shape[-1], generator=random), extra]]


class Latents:
    """A VAE whose pictures carry the latents' first three channels."""

    device = torch.device("cpu")

    def __init__(self, scale: int):
        self.scale, self.given = scale, []

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.given.append(latents.clone())
        flat = latents[:, :3] if latents.ndim == 4 else latents[:, :3, 0]
        return flat.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3).movedim(1, -1)


def made(model, small: Small, encoder, prompts, solver: str = "euler"):
    """The source's pictures of ``prompts`` [n, ...], and the source."""
    trajectory = trajectories.trajectory_of(model, solver, "simple", STEPS)
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = (size * scale for size in small.latent[-2:])
    source = sources.ComfySource(
        model, encoder, Latents(scale), trajectory, width=width, height=height, cfg=CFG
    )
    identity = candidates.Candidate.identity(trajectory)
    return source.images(prompts, [identity])[0], source


@pytest.mark.parametrize("small", KINDS, ids=lambda s: s.name)
def test_each_is_ksamplers_picture_of_that_prompt(small, files):
    model, encoder = files(small), Encoder(small)
    found, source = made(model, small, encoder, PROMPTS)
    assert source.nfe == STEPS * len(PROMPTS)
    for row, (text, seed) in enumerate(zip(PROMPTS.prompts, PROMPTS.seeds, strict=True)):
        empty = torch.zeros_like(source.latent)
        latents = comfy_sample.sample(
            model, comfy_sample.prepare_noise(empty, seed), STEPS, CFG, "euler", "simple",
            encoder.encode_from_tokens_scheduled(text), encoder.encode_from_tokens_scheduled(""),
            empty, seed=seed, disable_pbar=True,
        )  # fmt: skip
        (wanted,) = source.vae.decode(latents)[:1]
        wanted = wanted.float().clamp(0, 1)
        assert (found[row] - wanted).abs().max() <= 2 / 255, text
        assert wanted.std() > 0.05


def test_those_of_one_length_share_a_batch_whatever_is_between_them(files):
    model = files(FLUX_SCHNELL)
    _, source = made(model, FLUX_SCHNELL, Encoder(FLUX_SCHNELL), PROMPTS)
    assert source.alike(PROMPTS) == [[0, 2], [1], [3]]
    assert [len(latents) for latents in source.vae.given] == [2, 1, 1]
    masked = sources.ComfySource(
        model, Encoder(FLUX_SCHNELL, masked=True), None, source.trajectory, width=96, height=96
    )
    assert masked.alike(PROMPTS) == [[0, 2], [1], [3]]


def test_what_is_observed_keeps_the_prompts_order(files):
    model, encoder = files(FLUX_SCHNELL), Encoder(FLUX_SCHNELL)
    _, source = made(model, FLUX_SCHNELL, encoder, PROMPTS)
    together = source.observed(PROMPTS)
    again = source.observed(PROMPTS, together)
    for row in range(len(PROMPTS)):
        alone = source.observed(PROMPTS.part(row, row + 1))
        for step in range(STEPS):
            for name in ("latents", "outputs"):
                many, one = getattr(together, name)[step], getattr(alone, name)[step]
                torch.testing.assert_close(many[row : row + 1], one, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(again.outputs[step], together.outputs[step])
    assert together.nfe == STEPS * len(PROMPTS)


def test_states_for_rounding_belong_to_their_own_prompts(files):
    model, encoder = files(FLUX_SCHNELL), Encoder(FLUX_SCHNELL)
    _, source = made(model, FLUX_SCHNELL, encoder, PROMPTS)
    found = states.RecordedStates(source, model.model.diffusion_model, PROMPTS)
    lengths = [
        tensor.shape[1]
        for state in found._states
        for tensor in blocks.tensors_of(state.arguments)
        if tensor.ndim == 3 and tensor.shape[-1] == FLUX_SCHNELL.context
    ]
    # by step: the prompts, and the negative beside each
    assert Counter(lengths) == {12: 2 * STEPS, 20: STEPS, 7: STEPS, 9: 4 * STEPS}
