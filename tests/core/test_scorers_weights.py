"""Scorers with weights of their own: the published keys, and files that are something else."""

from __future__ import annotations

from itertools import pairwise

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_scorers import CONFIG, pictures

from qsched_core.objective import Objective
from qsched_core.scorers import Batch, ScorerError, Sources, build_scorer
from qsched_core.scorers.base import in_parts
from qsched_core.scorers.noun_phrases import noun_phrases
from qsched_core.scorers.open_clip import DualEncoder
from qsched_core.scorers.weights import from_huggingface, read_weights

PROMPTS = ("a red circle on a blue square", "two green rings", "a cat")
# Widths of published models: weights alone don't say how many heads a tower has.
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 384, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    return DualEncoder(model, tokenizer, {"size": 32, **CONFIG["preprocess_cfg"]}, {"file": "t"})


@pytest.fixture(scope="module")
def tuned():
    torch.manual_seed(1)
    return open_clip.CLIP(**TINY).eval()


def scorer(name, path, encoder):
    return build_scorer(name, Sources(encoder, files={name: path}))


def cosines(model, images):
    mean, std = (torch.tensor(v)[:, None, None] for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    with torch.no_grad():
        image = model.encode_image((images.movedim(-1, 1) - mean) / std, normalize=True)
        tokens = open_clip.SimpleTokenizer(context_length=77)(list(PROMPTS))
        return (image * model.encode_text(tokens, normalize=True)).sum(1)


@pytest.mark.parametrize("wrapped", [True, False])
def test_hps_is_the_cosine_of_its_own_open_clip_weights(tuned, encoder, tmp_path, wrapped):
    """Published as {"state_dict": ...} of a training run, or as safetensors."""
    path = tmp_path / ("hps.pt" if wrapped else "hps.safetensors")
    if wrapped:
        state = {f"module.{name}": value for name, value in tuned.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(tuned.state_dict(), path)
    made, images = scorer("hps", path, encoder), pictures()
    got = made.score(Batch(images, PROMPTS, encoder))
    torch.testing.assert_close(got, cosines(tuned, images), rtol=1e-5, atol=1e-6)
    assert made.describe()["encoder"]["file"] == path.name


def test_pickscore_in_transformers_keys_gives_transformers_own_numbers(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1,
            "num_attention_heads": 4, "hidden_act": "gelu"}  # fmt: skip
    vision = {**text, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 49408, "max_position_embeddings": 77,
                     "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():  # their start is too small to tell keys apart
        torch.nn.init.normal_(parameter, std=0.1)
    model.logit_scale.data.fill_(3.0)
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)

    made, images = scorer("pickscore", path, encoder), pictures()
    tokens = open_clip.SimpleTokenizer(context_length=77)(list(PROMPTS))
    pixels = made.encoder.preprocess(images)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()
    got = made.score(Batch(images, PROMPTS, encoder))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert got.std() > 0.01


def test_pickscore_may_be_in_open_clip_keys(tuned, encoder, tmp_path):
    path = tmp_path / "pick.safetensors"
    save_file(tuned.state_dict(), path)
    images = pictures()
    got = scorer("pickscore", path, encoder).score(Batch(images, PROMPTS, encoder))
    expected = tuned.logit_scale.exp() * cosines(tuned, images)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


def linear(width):
    torch.manual_seed(3)
    return torch.nn.Linear(width, 1)


def chain(width):
    torch.manual_seed(4)
    sizes = (width, 32, 16, 8, 4, 1)
    layers = []
    for k, (a, b) in enumerate(pairwise(sizes)):
        layers.append(torch.nn.Linear(a, b))
        if k < 3:
            layers.append(torch.nn.Dropout(0.2))
    module = torch.nn.Module()
    module.layers = torch.nn.Sequential(*layers)
    module.forward = module.layers.forward
    return module.eval()


@pytest.mark.parametrize("make", [linear, chain])
def test_aesthetic_predictors_in_both_published_layouts(make, encoder, tmp_path):
    module, path, images = make(16), tmp_path / "head.pth", pictures()
    torch.save(module.state_dict(), path)
    got = scorer("aesthetic", path, encoder).score(Batch(images, PROMPTS, encoder))
    with torch.no_grad():
        expected = module(encoder.encode_images(images))[:, 0]
    torch.testing.assert_close(got, expected)


def test_a_predictor_of_another_width_is_told(encoder, tmp_path):
    torch.save(linear(24).state_dict(), tmp_path / "head.pth")
    made = scorer("aesthetic", tmp_path / "head.pth", encoder)
    with pytest.raises(ScorerError, match="reads features 24 wide and the encoder gives 16"):
        made.score(Batch(pictures(), PROMPTS, encoder))


def test_files_that_are_something_else_are_named(tuned, encoder, tmp_path):
    def saved(name, content):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    state = tuned.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:999])
    lacking = {k: v for k, v in state.items() if k != "ln_final.bias"}
    broken = {**state, "ln_final.bias": torch.full((256,), torch.nan)}
    other = {**state, "extra.weight": torch.zeros(1)}
    narrow = {**state, "visual.proj": torch.zeros(384, 23)}
    hugging = {"text_model.encoder.layers.0.nonsense.weight": torch.zeros(1)}
    for name, path, says in (
        ("hps", tmp_path / "cut.safetensors", "cut.safetensors can't be read"),
        ("hps", saved("list.pt", [1, 2]), "holds no state dict"),
        ("hps", saved("head.pt", linear(8).state_dict()), "is no CLIP model"),
        ("hps", saved("lacking.pt", lacking), "lacks 1 weights, such as ln_final.bias"),
        ("hps", saved("nan.pt", broken), "ln_final.bias has NaN"),
        ("hps", saved("other.pt", other), "extra.weight"),
        ("hps", saved("narrow.pt", narrow), "does not fit"),
        ("pickscore", saved("odd.pt", {**hugging, "vision_model.x": torch.zeros(1)}), "nonsense"),
        ("aesthetic", saved("clip.pt", state), "no linear layer"),
        (
            "aesthetic",
            saved("wide.pt", torch.nn.Linear(16, 2).state_dict()),
            "must give one number",
        ),
    ):
        with pytest.raises(ScorerError, match=says):
            scorer(name, path, encoder)


def test_a_file_that_runs_code_is_not_read(tmp_path):
    torch.save({"weight": print}, tmp_path / "code.pt")
    with pytest.raises(ScorerError, match="can't be read"):
        read_weights(tmp_path / "code.pt")


def test_a_damaged_header_is_not_repeated_whole(tmp_path):
    """safetensors' error has all of the text that it did not expect."""
    header = b'{"a":{"dtype":"' + b"x" * 5000 + b'","shape":[1],"data_offsets":[0,4]}}'
    file = tmp_path / "scorer.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ScorerError, match="unknown variant `xxx") as error:
        read_weights(file)
    assert len(str(error.value)) < 400


def test_half_a_projection_is_told():
    weights = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(ScorerError, match=r"only \['q'\] of q, k and v"):
        from_huggingface(weights, "half.safetensors")


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red circle on a blue square", ("red circle", "blue square")),
        ("Portrait of an old man, wearing the green hat", ("Portrait", "old man", "green hat")),
        ("two cats and two dogs; two cats", ("two cats", "two dogs")),
        ("a state-of-the-art robot's hand", ("state-of-the-art robot's hand",)),
        ("on the", ("on the",)),
        ("eine rote Katze", ("eine rote Katze",)),
    ],
)
def test_prompts_are_cut_into_their_things(prompt, phrases):
    assert noun_phrases(prompt) == phrases


@given(st.text(min_size=1).filter(str.strip))
def test_any_prompt_has_a_phrase(prompt):
    phrases = noun_phrases(prompt)
    assert phrases and len(set(phrases)) == len(phrases) and all(phrases)


def test_aq_is_the_mean_over_phrases(encoder):
    images = pictures(1)
    got = build_scorer("aq", Sources(encoder)).score(Batch(images, PROMPTS[:1], encoder))
    image = encoder.encode_images(images)[0]
    cosine = encoder.encode_texts(["red circle", "blue square"]) @ image
    torch.testing.assert_close(got[0], (100 * cosine).clamp(min=1).log().mean())


def test_the_published_presets_score_end_to_end(tuned, encoder, tmp_path):
    save_file(tuned.state_dict(), tmp_path / "hps.safetensors")
    torch.save(linear(16).state_dict(), tmp_path / "head.pth")
    files = {"hps": tmp_path / "hps.safetensors", "aesthetic": tmp_path / "head.pth"}
    objective = Objective(encoder, quality_weight=2.0, formula="aq+hps", files=files)
    scores = objective.score(pictures(), PROMPTS)
    assert set(scores.terms) == {"aq", "hps"}
    assert scores.jaq == pytest.approx(
        [a + 2 * q for a, q in zip(scores.terms["aq"], scores.terms["hps"], strict=True)]
    )
    summed = Objective(encoder, formula="clip + 0.5*aesthetic + 3*hps", files=files)
    terms = summed.score(pictures(), PROMPTS).terms
    assert set(terms) == {"clip_score", "aesthetic", "hps"}
    assert summed.describe() != objective.describe()


def test_running_out_of_memory_halves_a_scorers_batch(monkeypatch, caplog):
    sizes = []

    def hungry(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return part * 2

    items = torch.arange(10.0)
    assert torch.equal(in_parts(items, 8, hungry), items * 2)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "2 images at a time" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(items, 8, lambda part: (_ for _ in ()).throw(torch.OutOfMemoryError()))
