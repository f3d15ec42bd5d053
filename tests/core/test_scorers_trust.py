"""A scorer's file is a stranger's: it downloads nothing, allocates nothing, and has its own heads."""

from __future__ import annotations

import copy
import json
import socket

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from test_scorers import CONFIG

from qsched_core.scorers import ScorerError, load_file, load_named
from qsched_core.scorers.towers import fetched_parts
from qsched_core.scorers.weights import clip_config, encoder_of, read_weights

# open_clip's models that a weights file alone describes: a ViT and CLIP's own text tower.
VARIED = ("no_ln_pre", "ls_init_value", "attentional_pool")


@pytest.fixture
def network(monkeypatch):
    """Every way out is closed; what tried to go there is listed."""
    tried = []

    def closed(name):
        def refuse(*args, **kwargs):
            tried.append((name, args))
            raise OSError("there is no network here")

        return refuse

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, closed(name))
    monkeypatch.setattr(socket.socket, "connect", closed("connect"))
    for name in ("hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, closed(name))
    for module in (open_clip.pretrained, open_clip.factory):
        for name in ("hf_hub_download", "download_pretrained", "download_pretrained_from_hf"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, closed(name))
    monkeypatch.setattr(open_clip.tokenizer.HFTokenizer, "__init__", closed("HFTokenizer"))
    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", closed("AutoConfig"))
    return tried


@pytest.fixture
def allocated(monkeypatch):
    """Whether a model was built with memory of its own."""
    real, clip = [], open_clip.CLIP

    def watched(*args, **kwargs):
        if torch.empty(0).device.type != "meta":
            real.append(kwargs)
        return clip(*args, **kwargs)

    monkeypatch.setattr(open_clip, "CLIP", watched)
    return real


def changed(**changes):
    """CONFIG with ``vision.x=`` and the like as ``vision_x=``."""
    config = copy.deepcopy(CONFIG)
    parts = {
        "model": config["model_cfg"],
        "vision": config["model_cfg"]["vision_cfg"],
        "text": config["model_cfg"]["text_cfg"],
        "preprocess": config["preprocess_cfg"],
    }
    for name, value in changes.items():
        part, _, key = name.partition("_")
        parts[part][key] = value
    return config


def file_with(tmp_path, config):
    path = tmp_path / "scorer.safetensors"
    text = config if isinstance(config, str) else json.dumps(config)
    save_file({"x": torch.zeros(1)}, path, {"open_clip_config": text})
    return path


HOSTILE = {
    "a text tower of a hub": (changed(text_hf_model_name="evil/repo"), "hf_model_name.*fetch"),
    "its weights": (
        changed(text_hf_model_name="roberta-base", text_hf_model_pretrained=True),
        "hf_model_name.*fetch",
    ),
    "a tokenizer of a hub": (changed(text_hf_tokenizer_name="evil/repo"), "hf_tokenizer_name"),
    "arguments of a tokenizer": (changed(text_tokenizer_kwargs={"x": 1}), "tokenizer_kwargs"),
    "an image tower of a hub": (
        changed(vision_timm_model_name="hf-hub:evil/repo", vision_timm_model_pretrained=True),
        "timm_model_name.*fetch",
    ),
    "pretrained weights": (changed(vision_timm_model_pretrained=True), "timm_model_pretrained"),
    "something unknown": (changed(model_multimodal_cfg={}), "'multimodal_cfg' is unknown"),
    "a width without bounds": (changed(vision_width=10**9), "'width' is 1000000000; it must be"),
    "layers without bounds": (changed(text_layers=10**6), "'layers' is"),
    "stages without bounds": (changed(vision_layers=[10**6] * 4), "'layers' is"),
    "a context without bounds": (changed(text_context_length=10**7), "'context_length' is"),
    "an image without bounds": (changed(vision_image_size=10**6), "'image_size' is"),
    "patches without bounds": (changed(vision_image_size=2048, vision_patch_size=1), "patches"),
    "a patch larger than the image": (changed(vision_patch_size=64), "patches"),
    "an odd vocabulary": (changed(text_vocab_size=10**9), "'vocab_size' is"),
    "queries without bounds": (
        changed(vision_attentional_pool=True, vision_attn_pooler_queries=10**9),
        "'attn_pooler_queries'",
    ),
    "a ratio that is no number": (changed(vision_mlp_ratio=float("nan")), "'mlp_ratio' is nan"),
    "a ratio without bounds": (changed(text_mlp_ratio=1e9), "'mlp_ratio' is"),
    "a width that is a text": (changed(vision_width="32"), "'width' is '32'"),
    "a width that is a bool": (changed(vision_width=True), "'width' is True"),
    "a width that is a list": (changed(vision_width=[32]), r"'width' is \[32\]"),
    "heads of zero": (changed(text_heads=0), "'heads' is 0"),
    "heads that do not divide": (changed(text_heads=3), "can't build"),
    "a preparation of another size": (changed(preprocess_size=10**6), "'size' is"),
    "a mean that is a text": (changed(preprocess_mean="abc"), "'mean' is"),
    "a mean of one number": (changed(preprocess_mean=0.5), "'mean'"),
    "no deviation": (changed(preprocess_std=[0, 0, 0]), "'std' is"),
    "a tower that is a list": (changed(model_vision_cfg=[1]), "vision_cfg is no object"),
    "a model that is a list": ({**CONFIG, "model_cfg": [1]}, "model_cfg is no object"),
    "no preparation": ({"model_cfg": CONFIG["model_cfg"]}, "preprocess_cfg is no object"),
    "5000 brackets": ("[" * 5000, "is not JSON"),
    "as much as the bounds allow": (
        changed(vision_width=8192, vision_layers=128, text_width=8192),
        "does not fit its open_clip_config metadata: it lacks",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_description_neither_downloads_nor_allocates(tmp_path, network, allocated, case):
    config, says = HOSTILE[case]
    for allow_download in (False, True):
        with pytest.raises(ScorerError, match=rf"scorer\.safetensors.*{says}"):
            load_file(file_with(tmp_path, config), allow_download=allow_download)
    assert network == [] and allocated == []


def test_a_description_may_say_the_defaults_as_null(tmp_path):
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    path = tmp_path / "scorer.safetensors"
    config = changed(text_hf_model_name=None, vision_timm_model_name=None, preprocess_mode="RGB")
    save_file(model.state_dict(), path, {"open_clip_config": json.dumps(config)})
    assert load_file(path).size == (32, 32)


ARCHITECTURES = (
    "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "nllb-clip-base", "mt5-base-ViT-B-32",
    "ViT-B-16-SigLIP", "ViT-H-14-worldwide", "ViT-L-14-CLIPA",
)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_with_parts_of_a_hub_needs_consent(tmp_path, network, architecture):
    path = file_with(tmp_path, CONFIG)
    with pytest.raises(ScorerError, match=rf"{architecture}.*downloaded.*allow_download"):
        load_file(path, architecture)
    assert network == []


def test_every_architecture_without_such_parts_has_clips_own_tokenizer(network, monkeypatch):
    own = object()
    monkeypatch.setattr(open_clip.factory, "SimpleTokenizer", lambda **options: own)
    names = [name for name in open_clip.list_models() if not fetched_parts(open_clip, name)]
    assert {"ViT-B-32", "ViT-bigG-14", "RN50", "convnext_base"} <= set(names)
    for name in names:
        assert open_clip.get_tokenizer(name) is own, name
    assert network == []


@pytest.mark.parametrize(
    "architecture",
    ["hf-hub:evil/repo", "local-dir:/tmp", "evil/repo", "hf-hub:", "ViT-B-32/openai"],
)
def test_an_architecture_is_a_name_that_open_clip_has(tmp_path, network, architecture):
    path = file_with(tmp_path, CONFIG)
    for allow_download in (False, True):
        with pytest.raises(ScorerError, match=r"architecture='.*is not one of"):
            load_file(path, architecture, allow_download=allow_download)
    with pytest.raises(ScorerError):
        load_named(architecture)
    assert network == []


def test_with_consent_it_is_tried(tmp_path, network):
    """What the other tests rely on: a download would have been seen."""
    with pytest.raises(ScorerError, match=r"roberta.*no network here"):
        load_file(file_with(tmp_path, CONFIG), "roberta-ViT-B-32", allow_download=True)
    assert [name for name, _ in network] == ["AutoConfig"]
    with pytest.raises(ScorerError, match="could not be downloaded"):
        load_named("ViT-B-32/laion2b_s34b_b79k", allow_download=True)
    assert len(network) == 2


def test_a_file_named_like_weights_of_open_clip_is_read_itself(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").write_bytes(b"no weights")
    with pytest.raises(ScorerError, match="openai could not be read"):
        load_file("openai", "ViT-B-32")
    assert network == []


def plain_towers():
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        own = not (
            {"timm_model_name", *VARIED} & set(vision)
            or {"hf_model_name", "hf_tokenizer_name"} & set(text)
            or {"custom_text", "multimodal_cfg"} & set(config)
        )
        if own and isinstance(vision["layers"], int):
            yield name


PLAIN = tuple(plain_towers())


def shallow(name):
    """The model ``name`` without memory and with one block a tower."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    with torch.device("meta"):
        return open_clip.CLIP(**config)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_alone_give_the_model_they_were_made_with(name):
    model = shallow(name)
    with torch.device("meta"):
        found = open_clip.CLIP(**clip_config(open_clip, model.state_dict(), "w.safetensors"))
    for ours, theirs in ((found.visual, model.visual), (found, model)):
        got, wanted = (tower.transformer.resblocks[0].attn.num_heads for tower in (ours, theirs))
        assert got == wanted
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (found, model)]
    assert shapes[0] == shapes[1]
    assert found.visual.image_size == model.visual.image_size


@pytest.mark.parametrize(
    ("name", "width"),
    [("ViT-B-32", 64), ("ViT-H-14", 80), ("ViT-g-14", 88), ("ViT-bigG-14", 104), ("ViT-e-14", 112)],
)
def test_heads_are_as_wide_as_published(name, width):
    assert name in PLAIN
    config = clip_config(open_clip, shallow(name).state_dict(), "w.safetensors")
    assert config["vision_cfg"]["head_width"] == width


@pytest.mark.parametrize(("tower", "cut"), [("image", 1400), ("text", 1000)])
def test_an_unknown_width_is_refused(tower, cut):
    config = open_clip.get_model_config("ViT-H-14")
    for part in ("vision_cfg", "text_cfg"):
        config[part]["layers"] = 1
    config["vision_cfg" if tower == "image" else "text_cfg"].update(
        {"width": cut, **({"head_width": 56} if tower == "image" else {"heads": 10})}
    )
    with torch.device("meta"):
        weights = open_clip.CLIP(**config).state_dict()
    with pytest.raises(
        ScorerError, match=rf"w\.pt: its {tower} tower is {cut} wide.*how many heads"
    ):
        encoder_of(weights, {}, "w.pt")


def test_another_vocabulary_is_refused():
    weights = {**shallow("ViT-B-32").state_dict()}
    weights["token_embedding.weight"] = torch.empty(250_000, 512, device="meta")
    with pytest.raises(ScorerError, match="vocabulary of 250000 tokens"):
        encoder_of(weights, {}, "w.pt")


def test_many_names_of_layers_do_not_make_a_large_model(allocated):
    weights = dict(shallow("ViT-B-32").state_dict())
    weights |= {f"transformer.resblocks.{n}.x": torch.zeros(0) for n in range(5000)}
    with pytest.raises(ScorerError, match="'layers' is 5000"):
        encoder_of(weights, {}, "w.pt")
    assert allocated == []


def test_a_small_file_that_claims_a_huge_tensor_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"visual.proj": torch.zeros(1).half().expand(10**6, 10**6)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ScorerError, match=r"bomb\.pt: visual\.proj is larger than what is stored"):
        read_weights(path)
