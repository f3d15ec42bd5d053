"""The models that a fresh installation may choose by name."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from qsched_core.scorers import NAMED, ScorerError, encoder_name, load_named


@pytest.mark.parametrize("encoder", NAMED, ids=lambda e: e.architecture)
def test_it_is_a_model_of_open_clip_of_the_size_it_says(encoder):
    assert encoder.weights in open_clip.list_pretrained_tags_by_model(encoder.architecture)
    with torch.device("meta"):
        model = CLIP(**open_clip.get_model_config(encoder.architecture))
    assert encoder.bytes == 4 * sum(p.numel() for p in model.parameters())
    assert f"({encoder.bytes / 1e9:.1f} GB, MIT)" in encoder.label
    assert encoder_name(encoder.label) == encoder.name


def test_anything_else_is_no_choice_of_ours():
    for label in ("", "ViT-B-32/laion2b_s34b_b79k", "ViT-B-32.safetensors"):
        assert encoder_name(label) is None


def test_it_is_fetched_with_consent_alone_and_to_the_folder_that_is_given(tmp_path, monkeypatch):
    asked = []

    def create(name, **options):
        asked.append((name, options["pretrained"], options["cache_dir"]))
        raise OSError("no network here")

    monkeypatch.setattr(open_clip, "create_model", create)
    name = NAMED[0].name
    with pytest.raises(ScorerError, match="set allow_download to agree"):
        load_named(name, folder=tmp_path)
    assert asked == []
    with pytest.raises(ScorerError, match="could not be downloaded: no network"):
        load_named(name, allow_download=True, folder=tmp_path)
    assert asked == [(NAMED[0].architecture, NAMED[0].weights, str(tmp_path))]
