"""The source of pictures inside ComfyUI: its prompts, its noise and its VAE."""

from __future__ import annotations

import importlib

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from graphs import SD15, conditioning, plain

trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
candidates = importlib.import_module("qsched_pack.qsched_core.trajectory")
sources = importlib.import_module("qsched_pack.nodes.host.source")


class Words:
    """A text encoder in two methods; prompts are numbers."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(SD15, int(tokens or 0))


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_sde"])
def test_the_pre_check_sees_the_latents_of_the_pictures(files, solver):
    """Each prompt has its own noise whatever is beside it, and every evaluation is counted."""
    model, steps = plain(files, SD15), 2
    trajectory = trajectories.trajectory_of(model, solver, "simple", steps)
    prompts = prompt_sets.PromptSet(("1", "2"), (11, 12))

    def seen(part):
        source = sources.ComfySource(model, Words(), None, trajectory, width=64, height=64)
        found = source.observed(part)
        each = 2 * steps - 1 if solver == "dpmpp_sde" else steps
        assert found.nfe == source.nfe == each * len(part)
        return found

    together, alone = seen(prompts), seen(prompts.part(1, 2))
    for many, one in zip(together.latents, alone.latents, strict=True):
        torch.testing.assert_close(many[1:], one, rtol=1e-3, atol=1e-3)


class Counted(Words):
    """Says how many texts it encoded."""

    def __init__(self):
        self.encoded: list[str] = []

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        self.encoded.append(tokens)
        return super().encode_from_tokens_scheduled(tokens)


def test_a_prompt_is_encoded_once_however_many_nodes_use_it(files):
    """A search, its control and an evaluation each have a source of their own."""
    model, clip = plain(files, SD15), Counted()
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)

    def observe(text_encoder, *prompts):
        sources.ComfySource(model, text_encoder, None, trajectory, width=64, height=64).observed(
            prompt_sets.PromptSet(prompts, tuple(range(len(prompts))))
        )

    observe(clip, "1", "2")
    observe(clip, "2", "3")
    assert clip.encoded == ["1", "2", "3"]
    other = Counted()
    observe(other, "1")
    assert other.encoded == ["1"], "what another text encoder gave is not this one's"
    clip.layer_idx = -2
    observe(clip, "1")
    assert clip.encoded == ["1", "2", "3", "1"], "it would give something else now"


class Decoder:
    """A VAE of one convolution on the CPU, and what it was given."""

    device = torch.device("cpu")

    def __init__(self):
        self.convolution = torch.nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.latents, self.made = latents, self.convolution(latents.to(self.device))
        larger = torch.nn.functional.interpolate(self.made, scale_factor=8)
        return larger.movedim(1, -1).sigmoid()


def test_a_vae_on_the_cpu_decodes_channels_last_to_the_same_pictures(files):
    model, vae = plain(files, SD15), Decoder()
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)
    source = sources.ComfySource(model, Words(), vae, trajectory, width=64, height=64)
    identity = candidates.Candidate.identity(trajectory)
    found = source.images(prompt_sets.PromptSet(("1", "2"), (11, 12)), [identity])[0]
    assert vae.made.is_contiguous(memory_format=torch.channels_last)
    wanted = vae.decode(vae.latents.contiguous())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.5 / 255 + 1e-5)  # 256 levels
