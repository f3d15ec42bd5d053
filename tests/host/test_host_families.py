"""Model families inside the real ComfyUI."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase

import pytest
import torch
from families import QWEN_IMAGE, SMALL, Small
from inside import Request, loading

from benchmarks._families import FAMILIES, weights

comfy_sd = importlib.import_module("comfy.sd")
comfy_sample = importlib.import_module("comfy.sample")
detection = importlib.import_module("comfy.model_detection")
management = importlib.import_module("comfy.model_management")
formats = importlib.import_module("qsched_pack.qsched_core.formats")
Policy = importlib.import_module("qsched_pack.qsched_core.formats.policy").Policy
QuantizedTensor = importlib.import_module("comfy_kitchen.tensor").QuantizedTensor
saving = importlib.import_module("qsched_pack.nodes.host.weights.saving")
save_file = importlib.import_module("safetensors.torch").save_file

# What stays as the file has it (embedders and heads), and what is modulation, by family: layer
# names written out here, so that they do not follow the policy's own lists.
UNET = (("time_embed.*", "label_emb.*", "input_blocks.0.0", "out.2"), ("*.emb_layers.1",))
SD3 = (
    ("x_embedder.*", "t_embedder.*", "y_embedder.*", "context_embedder", "final_layer.*"),
    ("joint_blocks.*.adaLN_modulation.1",),
)
FLUX = (
    ("img_in", "txt_in", "time_in.*", "vector_in.*", "guidance_in.*", "final_layer.*"),
    ("double_blocks.*.???_mod.lin", "single_blocks.*.modulation.lin"),
)
FLUX2 = (FLUX[0], ("double_stream_modulation_???.lin", "single_stream_modulation.lin"))
QWEN = (
    ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out"),
    ("transformer_blocks.*.???_mod.1",),
)
Z_IMAGE = (
    ("x_embedder", "cap_embedder.*", "t_embedder.*", "final_layer.*"),
    ("layers.*.adaLN_modulation.*", "noise_refiner.*.adaLN_modulation.*"),
)
LAYERS = {
    "sd15": UNET,
    "sdxl": UNET,
    "sd3": SD3,
    "sd35": SD3,
    "flux": FLUX,
    "flux2": FLUX2,
    "qwen": QWEN,
    "z": Z_IMAGE,
}
# The published models' weights, and the position table that SD3.5's file has besides.
COUNTS = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd35": 8_056_627_520 + 192 * 192 * 2432,
    "flux": 11_891_178_560,
    "qwen_image": 20_430_401_088,
    "z_image": 6_154_908_736,
    "flux2_klein": 3_875_544_576,
}
# Relative distance of a 4-step sample to the unquantized model's: a third above the largest that
# was measured with these weights (DiTs: nf4 .079, int8 .010, int2 .185; UNets: .105, .008, .306).
DIT_DISTANCE = {"nf4": 0.105, "int8": 0.0135, "int2": 0.25}
UNET_DISTANCE = {"nf4": 0.14, "int8": 0.0135, "int2": 0.41}
MODULATION_FORMAT = {"nf4": "nf4", "int8": "int8", "int2": "nf4"}  # base format: that of modulation


def is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layers_of(family: str):
    """(kept, modulation) patterns of a family, by the first part of its name."""
    return LAYERS[family.partition("_")[0]]


def sample(model, small: Small) -> torch.Tensor:
    conditioning = small.conditioning()
    empty = torch.zeros(small.latent)
    noise = comfy_sample.prepare_noise(empty, 3)
    return comfy_sample.sample(
        model, noise, 4, 1.0, "euler", "simple", conditioning, conditioning, empty,
        seed=3, disable_pbar=True,
    )  # fmt: skip


def relative(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


QUICK = ("sd15", "sd35", "flux_schnell")  # a UNet, and two kinds of transformer
EVERY = [pytest.param(s, marks=() if n in QUICK else pytest.mark.full) for n, s in SMALL.items()]


@pytest.fixture(scope="session", params=EVERY, ids=SMALL.keys())
def small(request) -> Small:
    return request.param


@pytest.fixture(scope="session")
def file(small, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / f"{small.name}.safetensors"
    save_file(small.weights(), path)
    return str(path)


@pytest.fixture(scope="session")
def wanted(small, file) -> torch.Tensor:
    """The unquantized model's sample."""
    return sample(comfy_sd.load_diffusion_model(file), small)


@pytest.fixture(scope="session", params=list(DIT_DISTANCE))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(file, name):
    return loading.load_diffusion_model(file, loading.Request(name))


def test_comfyui_takes_the_weights_for_the_family(small, model):
    config = detection.model_config_from_unet(small.weights(), "")
    assert type(config).__name__ == small.family.detected
    assert type(model.model.model_config).__name__ == small.family.detected
    for key, value in small.family.config.items():
        assert key not in config.unet_config or config.unet_config[key] == value, key


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_comfyui_detects_the_published_shapes(family):
    state = family.module().state_dict()
    config = detection.model_config_from_unet(state, "")
    assert type(config).__name__ == family.detected
    for key, value in family.config.items():
        assert config.unet_config[key] == value, key
    assert sum(v.numel() for v in state.values()) == COUNTS[family.name]


@pytest.mark.parametrize("base", MODULATION_FORMAT)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_default_policy_on_the_published_shapes(family, base):
    """Embedders and heads stay, modulation keeps 4 bits and its activations, all else is packed."""
    kept, modulation = layers_of(family.name)
    policy, met = Policy(base), set()
    for weight in weights(family.module()):
        if not weight.kind:
            continue
        choice = policy(weight.layer, weight.shape, weight.kind)
        if is_any(weight.layer, kept) or weight.kind not in formats.get(base).kinds:
            wanted = (None, False)
        elif is_any(weight.layer, modulation):
            wanted = (MODULATION_FORMAT[base], True)
        else:
            wanted = (base, False)
        met.add(wanted)
        assert (choice.format, choice.weight_only) == wanted, weight
    assert len(met) == 3


def test_it_samples_close_to_the_unquantized_model(small, name, model, wanted):
    assert wanted.std() > 0.5 and torch.isfinite(wanted).all()
    bound = (UNET_DISTANCE if layers_of(small.name) is UNET else DIT_DISTANCE)[name]
    assert 1e-4 < relative(sample(model, small), wanted) < bound


def test_every_layer_gets_what_the_policy_promises(small, name, model):
    kept, modulation = layers_of(small.name)
    modules, found = dict(model.model.diffusion_model.named_modules()), {}
    for weight in weights(small.family.module()):
        if not weight.kind:
            continue
        layer, module = weight.layer, modules[weight.layer]
        packed = isinstance(module.weight.data, QuantizedTensor)
        if is_any(layer, kept) or weight.kind not in formats.get(name).kinds:
            assert not packed, layer
            continue
        wanted = MODULATION_FORMAT[name] if is_any(layer, modulation) else name
        assert packed and module.choice.format == wanted, layer
        assert module.choice.weight_only == is_any(layer, modulation), layer
        found[wanted] = found.get(wanted, 0) + 1
    assert loading.model_info(model)["quantized_layers"] == found


def test_model_size_shrinks_to_what_the_formats_state(small, name, model):
    """What ComfyUI counts is packed layers, the rest at fp16, and at most 600 bytes a layer."""
    policy, state, count, layers = Policy(name), small.weights(), 0, 0
    for weight in weights(small.family.module()):
        choice = policy(weight.layer, weight.shape, weight.kind) if weight.kind else None
        if choice is None or choice.format is None:
            count += state[weight.key].nbytes
        else:
            count += formats.get(choice.format).packed_bytes(weight.shape)
            layers += 1
    info = loading.model_info(model)
    assert count <= info["weight_bytes"] <= count + 600 * layers
    assert 0 <= model.model_size() - info["weight_bytes"] < 50_000  # the table of sigmas
    assert info["unquantized_bytes"] == sum(v.nbytes for v in state.values())


def test_convolutions_are_packed_but_for_the_first_and_the_last(small, name, model):
    info, modules = loading.model_info(model), dict(model.model.diffusion_model.named_modules())
    layers = {w.layer for w in weights(small.family.module()) if w.kind == "conv2d"}
    plain = {x for x in layers if not isinstance(modules[x].weight.data, QuantizedTensor)}
    ends = {"input_blocks.0.0", "out.2", "x_embedder.proj"} & layers
    assert len(layers) > 20 or layers_of(small.name) is not UNET
    if "conv2d" in formats.get(name).kinds:
        assert plain == ends
    else:
        assert plain == layers
        assert info["kept_because"].get(f"{name} is for linear", 0) == len(layers - ends)


@pytest.mark.full
def test_qwen_image_with_one_block(tmp_path):
    """Its width is fixed, so this is 0.38 billion weights; in int8, which packs fastest."""
    path = tmp_path / "qwen.safetensors"
    save_file(QWEN_IMAGE.weights(), path)
    try:
        model = loading.load_diffusion_model(str(path), loading.Request("int8"))
        assert type(model.model.model_config).__name__ == "QwenImage"
        found = sample(model, QWEN_IMAGE)
        assert loading.model_info(model)["quantized_layers"] == {"int8": 14}
        assert model.model_size() < 0.6 * path.stat().st_size
        del model
        management.unload_all_models()
        wanted = sample(comfy_sd.load_diffusion_model(str(path)), QWEN_IMAGE)
        assert 1e-4 < relative(found, wanted) < DIT_DISTANCE["int8"]
    finally:
        path.unlink()


@pytest.mark.parametrize("weight_format", ["nf4", pytest.param("int2", marks=pytest.mark.full)])
@pytest.mark.parametrize("family", ["sd15", "sdxl_koala", "flux_dev", "sd35"])
def test_comfyuis_own_loader_says_what_opens_an_extended_file(family, weight_format, tmp_path):
    source, path = tmp_path / "source.safetensors", tmp_path / "saved.safetensors"
    save_file(SMALL[family].weights(), source)
    saving.save_model(loading.load_diffusion_model(str(source), Request(weight_format)), path)
    with pytest.raises(KeyError, match=r"open this file with Load Diffusion Model \(Quantized\)"):
        comfy_sd.load_diffusion_model(str(path))
    loading.load_diffusion_model(str(path), Request(weight_format))
