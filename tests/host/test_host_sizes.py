"""Width and height: every multiple of a latent's pixels can be made, and nothing else is tried."""

from __future__ import annotations

import importlib
from math import ceil

import inside  # noqa: F401  the pack becomes importable
import pytest
import torch
from families import FLUX2_KLEIN, FLUX_SCHNELL, LTXV, SD3, SD15, SDXL, WAN, Small
from graphs import conditioning, plain
from hypothesis import given
from hypothesis import strategies as st

trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
sources = importlib.import_module("qsched_pack.nodes.host.source")
supported = importlib.import_module("comfy.supported_models")

FAMILIES = (SD15, SDXL, SD3, FLUX_SCHNELL, FLUX2_KLEIN, WAN, LTXV)
PROMPTS = prompt_sets.PromptSet(("1",), (11,))


class Words:
    """A text encoder of a family; prompts are numbers."""

    def __init__(self, small: Small):
        self.small = small

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(self.small, int(tokens or 0))


def source(files, small: Small, width: int, height: int):
    model = plain(files, small)
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 1)
    return sources.ComfySource(model, Words(small), None, trajectory, width=width, height=height)


def ratio_of(files, small: Small) -> int:
    return plain(files, small).get_model_object("latent_format").spacial_downscale_ratio


@pytest.mark.parametrize("small", FAMILIES, ids=lambda small: small.name)
def test_odd_numbers_of_latents_are_made_as_asked(files, small):
    """Neither 5 nor 3 is a multiple of any patch, nor can a UNet halve them."""
    ratio = ratio_of(files, small)
    found = source(files, small, 5 * ratio, 3 * ratio).observed(PROMPTS)
    assert all(latent.shape[-2:] == (3, 5) for latent in found.latents)
    assert all(torch.isfinite(latent).all() for latent in found.latents)


@pytest.mark.parametrize("small", FAMILIES, ids=lambda small: small.name)
def test_another_size_is_refused_with_the_nearest(files, small):
    ratio = ratio_of(files, small)
    with pytest.raises(
        sources.SourceError,
        match=f"height={3 * ratio + 1} must be a multiple of {ratio} for this model; "
        f"set it to {3 * ratio} or {4 * ratio}$",
    ):
        source(files, small, 5 * ratio, 3 * ratio + 1)


def test_a_table_of_positions_is_a_bound(files):
    """SD3's is 32 patches of 2 latents here: one more, and ComfyUI fails with a bare assertion."""
    assert source(files, SD3, 512, 16).observed(PROMPTS).latents
    with pytest.raises(sources.SourceError, match=r"width=520 is more .*; set at most 512"):
        source(files, SD3, 520, 16)


RATIOS = sorted({model.latent_format.spacial_downscale_ratio for model in supported.models})


@given(st.sampled_from(RATIOS), st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 100)))
def test_what_is_named_can_be_set(ratio, value, largest):
    """Of every family that ComfyUI has."""
    try:
        sources.check_size({"width": value}, ratio, largest)
    except sources.SourceError as error:
        for near in str(error).rpartition("set ")[2].split():
            if near.isdigit():
                sources.check_size({"width": int(near)}, ratio, largest)
    else:
        assert value % ratio == 0 and (not largest or ceil(value / ratio) <= largest)
