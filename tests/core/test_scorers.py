"""Scorers: files that describe themselves, preprocessing as open_clip's, errors that say the fix."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types
from importlib.machinery import ModuleSpec

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import CONFIG

from qsched_core.optional import MissingDependencyError, missing, require
from qsched_core.scorers import (
    SCORERS,
    Batch,
    ScorerError,
    Sources,
    build_scorer,
    check_images,
    check_scorer,
    load_file,
    load_named,
    scorer_names,
)
from qsched_core.scorers.clip_iqa import ClipIqa

PROMPTS = ("a red circle", "a blue square", "two green rings")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"])).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "tiny.safetensors"
    save_file(model.state_dict(), path, {"open_clip_config": json.dumps(CONFIG)})
    return path


@pytest.fixture
def encoder(weights):
    return load_file(weights)


def pictures(n=3, height=32, width=32, seed=0):
    return torch.rand(n, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_a_self_described_file_gives_the_models_own_features(model, encoder):
    images = pictures()
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((images.movedim(-1, 1) - mean) / std, normalize=True)
        tokens = open_clip.SimpleTokenizer(context_length=12)(list(PROMPTS))
        expected_text = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_images(images), expected)
    torch.testing.assert_close(encoder.encode_texts(PROMPTS), expected_text)


@pytest.mark.parametrize("height,width", [(32, 32), (64, 96), (97, 41), (16, 24), (33, 500)])
def test_preprocessing_is_open_clips(encoder, height, width):
    ramp = torch.linspace(0, 1, width)[None, :, None].expand(height, -1, 3).clone()
    ramp[height // 3 :, :, 1] = 0.25
    levels = (ramp * 255).round()
    transform = open_clip.image_transform(
        32, is_train=False, mean=tuple(encoder.mean), std=tuple(encoder.std)
    )
    expected = transform(Image.fromarray(levels.to(torch.uint8).numpy()))
    ours = encoder.preprocess(levels[None] / 255)[0]
    assert ours.shape == expected.shape
    # PIL rounds to 8 bits between the two passes of its resize
    assert (ours - expected).abs().max() < 4 / 255 / min(encoder.std)


def test_an_image_scores_the_same_alone_and_in_any_batch(encoder):
    images = pictures(40)
    together = encoder.encode_images(images)
    alone = torch.cat([encoder.encode_images(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_alignment_and_quality_encode_an_image_once_and_a_text_once(encoder, monkeypatch):
    calls = {"encode_image": 0, "encode_text": 0}
    for name in calls:
        original = getattr(encoder.model, name)

        def counted(x, *args, _name=name, _original=original, **kwargs):
            calls[_name] += len(x)
            return _original(x, *args, **kwargs)

        monkeypatch.setattr(encoder.model, name, counted)
    scorers = [build_scorer("clip", Sources(encoder))]
    scorers += [build_scorer("clip_iqa", Sources(encoder))]
    for _ in range(3):
        batch = Batch(pictures(), PROMPTS, encoder)
        for scorer in scorers:
            assert scorer.score(batch).shape == (3,)
    assert calls == {"encode_image": 9, "encode_text": len(PROMPTS) + 2}


def test_clip_iqa_is_a_softmax_over_the_antonym_pair(encoder):
    batch = Batch(pictures(), PROMPTS, encoder)
    good = ClipIqa(encoder).score(batch)
    bad = ClipIqa(encoder, ("Bad photo.", "Good photo.")).score(batch)
    torch.testing.assert_close(good + bad, torch.ones(3))
    logits = encoder.logit_scale * (
        batch.image_features @ encoder.encode_texts(("Good photo.", "Bad photo.")).T
    )
    torch.testing.assert_close(good, logits.softmax(1)[:, 0])


def test_the_encoder_asks_where_to_run_before_each_use(weights):
    placed = []

    def place(module):
        placed.append(module)
        return torch.device("cpu")

    encoder = load_file(weights, place=place)
    encoder.encode_images(pictures())
    encoder.encode_texts(PROMPTS)
    assert placed == [encoder.model, encoder.model]


def test_a_file_without_a_description_needs_the_architecture(model, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ScorerError, match=r"plain\.safetensors.*set architecture.*ViT-B-32"):
        load_file(path)
    with pytest.raises(ScorerError, match="architecture='ViT-Z-1'"):
        load_file(path, "ViT-Z-1")
    for odd in ("x" * 10**6, "a\u202eb\x1b[31m"):
        for load in (lambda odd: load_file(path, odd), load_named):
            with pytest.raises(ScorerError, match="architecture='") as error:
                load(odd)
            assert len(str(error.value)) < 600 and str(error.value).isprintable()
    with pytest.raises(ScorerError, match="could not be read as open_clip's 'ViT-B-32'"):
        load_file(path, "ViT-B-32")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_named_architecture_reads_plain_weights(tmp_path, suffix):
    torch.manual_seed(1)
    plain = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": plain.state_dict()}, path)
    else:
        save_file(plain.state_dict(), path)
    encoder = load_file(path, "ViT-S-32-alt")
    assert encoder.size == (224, 224)
    assert encoder.describe()["architecture"] == "ViT-S-32-alt"
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ScorerError, match=r"evil\.pt"):
        load_file(path, "ViT-S-32-alt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "metadata,reason",
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ("{}", "does not describe"),
        (json.dumps({"model_cfg": {"embed_dim": 1}, "preprocess_cfg": {}}), "does not describe"),
        (json.dumps(CONFIG).replace('"width": 32', '"width": 64'), "does not fit"),
    ],
)
def test_a_broken_description_is_told(model, tmp_path, metadata, reason):
    path = tmp_path / "odd.safetensors"
    save_file(model.state_dict(), path, {"open_clip_config": metadata})
    with pytest.raises(ScorerError, match=rf"odd\.safetensors.*{reason}"):
        load_file(path)


def test_a_file_that_is_missing_or_garbage_is_told(tmp_path):
    with pytest.raises(ScorerError, match="does not exist"):
        load_file(tmp_path / "none.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\x00" * 64)
    with pytest.raises(ScorerError, match="not a readable safetensors file"):
        load_file(garbage)


def test_nothing_is_downloaded_without_consent(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    with pytest.raises(ScorerError, match="allow_download"):
        load_named("ViT-B-32/openai")
    with pytest.raises(ScorerError, match=r"known: ViT-B-32/openai"):
        load_named("ViT-B-32/nobody", allow_download=True)


def test_unknown_scorers_are_told_the_known_ones():
    with pytest.raises(ScorerError, match=r"quality='beauty' is unknown; choose one of clip_iqa"):
        check_scorer("beauty", "quality")
    with pytest.raises(ScorerError, match="unknown"):
        check_scorer("clip_iqa", "alignment")
    with pytest.raises(ScorerError, match="takes no option"):
        check_scorer("clip_iqa:x", "quality")
    assert scorer_names("alignment") == ["clip", "aq"]
    assert {"clip_iqa", "pyiqa:METRIC", "hps"} <= set(scorer_names("quality"))


def test_without_pyiqa_the_reason_has_the_licence_and_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ScorerError, match=r"PolyForm-Noncommercial.*pip install pyiqa"):
        check_scorer("pyiqa:musiq", "quality")


class FakeMetric(torch.nn.Module):
    """Mean brightness, in place of a pyiqa metric."""

    def __init__(self, lower_better):
        super().__init__()
        self.lower_better = lower_better
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.mean((1, 2, 3))[:, None]


@pytest.fixture
def pyiqa(monkeypatch):
    fake = types.ModuleType("pyiqa")
    fake.__spec__ = ModuleSpec("pyiqa", None)
    fake.list_models = lambda metric_mode: {"NR": ["bright", "dark"]}[metric_mode]
    fake.create_metric = lambda name, device: FakeMetric(name == "dark")
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    return fake


@pytest.mark.parametrize("metric,sign", [("bright", 1), ("dark", -1)])
def test_a_pyiqa_metric_is_turned_so_that_higher_is_better(pyiqa, encoder, metric, sign):
    images = pictures(20)
    scorer = build_scorer(f"pyiqa:{metric}", Sources(encoder, allow_download=True), "quality")
    scores = scorer.score(Batch(images, PROMPTS[:1] * 20, encoder))
    torch.testing.assert_close(scores, sign * images.mean((1, 2, 3)))
    assert scorer.describe()["sign"] == sign
    assert "Noncommercial" in scorer.describe()["licence"]


def test_a_pyiqa_metric_must_exist_and_be_named(pyiqa, encoder):
    with pytest.raises(ScorerError, match=r"pyiqa:psnr.*choose one of bright, dark"):
        build_scorer("pyiqa:psnr", Sources(encoder), "quality")
    with pytest.raises(ScorerError, match="names no metric"):
        build_scorer("pyiqa", Sources(encoder), "quality")


def test_a_pyiqa_metric_whose_weights_cannot_be_had_is_told(pyiqa, encoder):
    def fail(name, device):
        raise OSError("no route to host")

    pyiqa.create_metric = fail
    with pytest.raises(ScorerError, match=r"pyiqa:bright.*no route to host.*network"):
        build_scorer("pyiqa:bright", Sources(encoder, allow_download=True), "quality")


def test_a_pyiqa_metric_is_downloaded_with_consent_alone(pyiqa, encoder):
    pyiqa.create_metric = lambda name, device: pytest.fail("went to the network")
    with pytest.raises(ScorerError, match=r"pyiqa:bright.*allow_download"):
        build_scorer("pyiqa:bright", Sources(encoder), "quality")


@pytest.mark.parametrize(
    "images,prompts,reason",
    [
        (torch.rand(3, 3, 8, 8), PROMPTS, "shape"),
        (torch.rand(0, 8, 8, 3), (), "shape"),
        (torch.rand(2, 8, 8, 3), PROMPTS, "2 images but 3 prompts"),
        (torch.full((3, 8, 8, 3), float("nan")), PROMPTS, "image 1 of 3.*'a red circle'.*NaN"),
    ],
)
def test_images_that_can_not_be_scored_are_told(images, prompts, reason):
    with pytest.raises(ScorerError, match=reason):
        check_images(images, prompts)


def test_every_scorer_names_its_licence_and_what_it_measures():
    for name, entry in SCORERS.items():
        assert entry.name == name
        assert entry.measures in ("alignment", "quality")
        assert entry.licence


def test_an_optional_dependency_is_imported_or_explained(monkeypatch):
    assert missing("json", "x", "json") is None
    assert require("json", "x", "json") is json
    with pytest.raises(MissingDependencyError, match=r"the moon needs .* run: pip install cheese"):
        require("no_such_package", "the moon", "cheese")
