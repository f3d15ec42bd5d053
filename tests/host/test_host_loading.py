"""Quantized loading inside the real ComfyUI."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path

import pytest
import torch
from inside import (
    ALL,
    DISTANCE,
    LOAD_DEVICE,
    Request,
    comfy_sd,
    formats,
    loading,
    management,
    relative,
    same_state,
    save_file,
    state_bytes,
    taesd,
    weights,
    with_lora,
)


@ALL
def test_it_samples_close_to_the_unquantized_model(name, loaded, plain, sample):
    model = loaded(name)
    assert 0 < relative(sample(model), sample(plain)) < DISTANCE[name]
    info = loading.model_info(model)
    assert info["format"] == name and info["source"] == "tiny.safetensors" and info["backend"]
    assert info["source_hash"] == loading.model_info(plain)["source_hash"]
    assert info["unquantized_bytes"] == sum(v.nbytes for v in weights().values())
    json.dumps(info)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_float_checkpoints_load_and_have_the_same_hash(dtype, file, sample, tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_file({key: value.to(dtype) for key, value in weights().items()}, path)
    model = loading.load_diffusion_model(path, Request("nf4"))
    half = loading.load_diffusion_model(file, Request("nf4"))
    assert relative(sample(model), sample(half)) < 0.05
    hashes = {loading.model_info(m)["source_hash"] for m in (model, half)}
    assert len(hashes) == 1


@ALL
def test_model_size_is_what_is_stored(name, loaded):
    """The packed layers take the format's bits, all else 16, and a few hundred bytes a layer of JSON."""
    model = loaded(name)
    modulation = "nf4" if name in ("int2", "int3") else name
    blocks = {k: v for k, v in weights().items() if k.startswith("joint_blocks") and v.ndim == 2}
    wanted = sum(v.nbytes for k, v in weights().items() if k not in blocks)
    for key, value in blocks.items():
        form = formats.get(modulation if "adaLN" in key else name)
        if form.unfit(tuple(value.shape)) is not None:
            wanted += value.nbytes
            continue
        assert 0.99 * form.bits < 8 * form.packed_bytes(tuple(value.shape)) / value.numel()
        wanted += form.packed_bytes(tuple(value.shape))
    assert wanted < model.model_size() < wanted + 400 * len(blocks)


@ALL
def test_lora_baked_and_removed(name, loaded, plain, sample, lora):
    model = loaded(name)
    bare, stored = sample(model), state_bytes(model)
    patched = with_lora(model, lora)
    assert patched.model_options["qsched"] == model.model_options["qsched"]
    assert loading.model_info(patched)["patches"] != loading.model_info(model)["patches"] == ""
    wanted = sample(with_lora(plain, lora))
    found = sample(patched)
    assert relative(found, wanted) < 0.65 * relative(bare, wanted)
    assert torch.equal(sample(model), bare), "unpatching must be exact"
    assert same_state(state_bytes(model), stored)


@torch.no_grad()
def once(model, conditioning) -> torch.Tensor:
    """One evaluation of a model that is loaded, on inputs that are where it computes."""
    ((context, extra),) = conditioning
    x = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(4))
    x, sigma, context, pooled = (
        t.to(LOAD_DEVICE) for t in (x, torch.full((1,), 0.8), context, extra["pooled_output"])
    )
    return model.model.apply_model(x, sigma, c_crossattn=context, y=pooled)


@ALL
def test_lora_at_run_time(name, file, plain, conditioning, lora):
    """With weights offloaded the host adds the LoRA to the dequantized weight in each forward."""

    def forward(model):
        return once(model, conditioning)

    management.unload_all_models()
    model = with_lora(loading.load_diffusion_model(file, Request(name)), lora)
    model.patch_model(device_to=LOAD_DEVICE, lowvram_model_memory=1)
    found = forward(model)
    model.unpatch_model()
    reference = with_lora(plain, lora)
    management.load_models_gpu([reference])
    wanted = forward(reference)
    assert relative(found, wanted) < 2 * DISTANCE[name]
    management.unload_all_models()


def test_bypass_loras_and_changed_strengths(loaded, plain, sample, lora):
    """ComfyUI's "bypass" LoRA loader adds to the output; several LoRAs add up, each run anew."""
    model = loaded("nf4")
    bare = sample(model)
    bypass = comfy_sd.load_bypass_lora_for_models(model, None, lora, 0.7, 0)[0]
    wanted = sample(with_lora(plain, lora, 0.7))
    assert relative(sample(bypass), wanted) < 2 * DISTANCE["nf4"]
    assert torch.equal(sample(model), bare)
    twice = with_lora(with_lora(model, lora, 0.4), lora, 0.3)
    assert relative(sample(twice), wanted) < 2 * DISTANCE["nf4"]
    stronger = with_lora(model, lora, 1.0)
    assert relative(sample(stronger), sample(with_lora(plain, lora, 1.0))) < 2 * DISTANCE["nf4"]
    assert torch.equal(sample(model), bare)


@pytest.mark.parametrize("name", ["nf4", "w4a8", "int2"])
def test_small_loras_do_not_vanish(name, loaded, plain, sample, lora):
    """A LoRA far below a step of the format moves the baked model along, and in its direction."""
    small = {k: v * 0.25 if ".lora_A." in k else v for k, v in lora.items()}
    model = loaded(name)
    wanted = sample(with_lora(plain, small)) - sample(plain)
    assert wanted.norm() / sample(plain).norm() < 0.5
    moved = sample(with_lora(model, small)) - sample(model)
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.5
    share = (moved.flatten() @ wanted.flatten() / wanted.norm() ** 2).item()
    assert 0.6 < share < 1.4


def test_two_quantized_models_do_not_disturb_each_other(file, sample):
    """Different formats in one graph, by turns, unloaded and loaded again in between."""
    first = loading.load_diffusion_model(file, Request("nf4"))
    second = loading.load_diffusion_model(file, Request("int2", "*mlp*=int8"))
    wanted = [sample(first), sample(second)]
    for _ in range(2):
        assert torch.equal(sample(first), wanted[0])
        management.unload_all_models()
        assert torch.equal(sample(second), wanted[1])


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_partly_offloaded_model_samples_the_same(name, file, sample, conditioning):
    """Half of the weights stay behind and are cast in each forward (--lowvram)."""
    model = loading.load_diffusion_model(file, Request(name))

    def forward():
        return once(model, conditioning)

    management.unload_all_models()
    model.patch_model(device_to=LOAD_DEVICE)
    wanted = forward()
    model.unpatch_model()
    model.patch_model(device_to=LOAD_DEVICE, lowvram_model_memory=model.model_size() // 2)
    assert model.model.model_lowvram
    assert torch.equal(forward(), wanted)
    # More than the model's size: the host sets aside what casting its largest layer takes.
    model.partially_load(LOAD_DEVICE, extra_memory=2 * model.model_size())
    assert not model.model.model_lowvram
    assert torch.equal(forward(), wanted)
    freed = model.partially_unload(LOAD_DEVICE, model.model_size() // 3)
    assert freed > 0
    assert torch.equal(forward(), wanted)
    model.unpatch_model()
    management.unload_all_models()


@ALL
def test_dynamic_vram_moves_every_table_through_one_buffer(name, loaded):
    """ComfyUI's dynamic loading gathers a layer's tensors in a buffer and reads them from there."""
    memory = importlib.import_module("comfy.memory_management")
    model, count = loaded(name), 0
    for layer in model.model.diffusion_model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, loading.QuantizedTensor):
            continue
        tensors = [weight, layer.bias]
        size = memory.vram_aligned_size(tensors)
        buffer = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        assert buffer.numel() >= sum(
            t.nbytes for k, t in layer.state_dict().items() if k != "comfy_quant"
        )
        management.cast_to_gathered(tensors, buffer)
        found, bias = memory.interpret_gathered_like(tensors, buffer)
        assert torch.equal(found.dequantize(), weight.dequantize())
        assert bias is None or torch.equal(bias, layer.bias)
        count += 1
    assert count == sum(loading.model_info(model)["quantized_layers"].values()) > 0


@pytest.mark.parametrize(
    "name", ["nf4", *(pytest.param(n, marks=pytest.mark.full) for n in ("int8", "w4a8", "int2"))]
)
def test_torch_compile_gives_the_same_picture(name, loaded, sample):
    """ComfyUI's TorchCompileModel; the "eager" backend traces all and compiles nothing."""
    compiler = importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    model = loaded(name)
    compiled = model.clone()
    compiler(model=compiled, backend="eager")
    assert relative(sample(compiled), sample(model)) < 0.02


@ALL
def test_quantize_model_leaves_its_input_alone(name, file, plain, sample):
    before, stored = sample(plain), state_bytes(plain)
    model = loading.quantize_model(plain, Request(name))
    assert torch.equal(sample(model), sample(loading.load_diffusion_model(file, Request(name))))
    assert torch.equal(sample(plain), before)
    assert same_state(state_bytes(plain), stored)
    assert "qsched" not in plain.model_options
    assert model.parent is None and model.model is not plain.model
    assert loading.model_info(model)["source_hash"] == loading.model_info(plain)["source_hash"]
    # A GPU keeps the unquantized weights in 16 bits, a CPU in 32.
    assert model.model_size() < (0.6 if LOAD_DEVICE.type == "cpu" else 0.65) * plain.model_size()


def test_quantize_model_merges_loras_before_rounding(plain, sample, lora):
    patched = with_lora(plain, lora)
    wanted = sample(patched)
    model = loading.quantize_model(patched, Request("nf4"))
    assert not model.patches
    assert loading.model_info(model)["merged_patches"] == loading.model_info(patched)["patches"]
    assert relative(sample(model), wanted) < 2 * DISTANCE["nf4"]
    assert relative(sample(patched), wanted) == 0
    # and once more on top, as the LoRA nodes do
    assert relative(sample(with_lora(model, lora, 0.5)), wanted) > 0


@ALL
def test_clone_and_a_second_loading_are_the_same(name, file, sample):
    model = loading.load_diffusion_model(file, Request(name))
    wanted = sample(model)
    clone = model.clone()
    assert torch.equal(sample(clone), wanted)
    assert clone.model_options["qsched"] == model.model_options["qsched"]
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert torch.equal(sample(again), wanted)
    deep = model.deepclone_multigpu()
    assert deep.model is not model.model and torch.equal(sample(deep), wanted)


def test_a_quantized_model_can_be_made_again_from_its_source(plain, sample, lora):
    model = loading.quantize_model(with_lora(plain, lora), Request("w4a8"))
    factory, arguments = model.cached_patcher_init
    assert torch.equal(sample(factory(*arguments, disable_dynamic=True)), sample(model))


def saved(model, tmp_path) -> str:
    path = str(tmp_path / "saved.safetensors")
    management.unload_all_models()
    comfy_sd.save_checkpoint(path, model, metadata={})
    return path


@ALL
def test_saved_files_come_back_bit_for_bit(name, loaded, sample, tmp_path):
    model = loaded(name)
    wanted, path = sample(model), saved(model, tmp_path)
    assert Path(path).stat().st_size < model.model_size() + 100_000
    again = loading.load_diffusion_model(path, Request(name))
    assert torch.equal(sample(again), wanted)
    assert same_state(state_bytes(again), state_bytes(model))
    assert loading.model_info(again)["source_hash"] == loading.model_info(model)["source_hash"]
    other = "int8" if name == "w4a8" else "w4a8"
    with pytest.raises(ValueError, match=f"quantized already, to .*{name}"):
        loading.load_diffusion_model(path, Request(other))


def test_native_files_open_in_plain_comfyui(loaded, sample, tmp_path):
    model = loaded("int8")
    wanted, path = sample(model), saved(model, tmp_path)
    core = comfy_sd.load_diffusion_model(path)
    assert relative(sample(core), wanted) < 0.03  # there modulation has int8 activations too
    assert "INT8" in loading.model_info(core)["format"]


def test_extended_files_fail_loudly_in_plain_comfyui(loaded, tmp_path):
    path = saved(loaded("nf4"), tmp_path)
    with pytest.raises(Exception, match=r"qsched_nf4|size mismatch|Could not detect"):
        comfy_sd.load_diffusion_model(path)


def test_overrides_reach_the_layers(file):
    request = Request("int2", "context_embedder=int8; *mlp*=keep; joint_blocks.0.x_block.attn=nf4")
    model = loading.load_diffusion_model(file, request)
    info = loading.model_info(model)
    layers = dict(model.model.diffusion_model.named_modules())
    assert layers["context_embedder"].choice.format == "int8"
    assert layers["joint_blocks.0.x_block.mlp.fc1"].choice.format is None
    assert layers["joint_blocks.0.x_block.attn.qkv"].choice.format == "nf4"
    assert layers["joint_blocks.1.x_block.attn.qkv"].choice.format == "int2"
    assert layers["joint_blocks.1.x_block.adaLN_modulation.1"].weight_only
    assert set(info["quantized_layers"]) == {"int2", "int8", "nf4"}
    assert "context_embedder=int8" in info["layers"]


def test_a_pattern_without_a_layer_is_named(file):
    with pytest.raises(ValueError, match=r"'img_im' matches none.*joint_blocks"):
        loading.load_diffusion_model(file, Request("nf4", "img_im=keep"))


@ALL
def test_a_checkpoint_gives_a_plain_vae(name, tmp_path, sample):
    torch.manual_seed(0)
    state = {f"model.diffusion_model.{k}": v for k, v in weights().items()}
    state |= {f"first_stage_model.{k}": v for k, v in taesd.TAESD().state_dict().items()}
    path = str(tmp_path / "checkpoint.safetensors")
    save_file(state, path)
    model, clip, vae = loading.load_checkpoint(path, Request(name))
    assert clip is None
    assert {p.dtype for p in vae.first_stage_model.parameters()} <= {torch.float32, torch.bfloat16}
    sample(model)
    assert loading.model_info(model)["unquantized_bytes"] == sum(
        v.nbytes for v in weights().values()
    )


def broken(file, tmp_path, change) -> str:
    state = weights()
    change(state)
    path = str(tmp_path / "broken.safetensors")
    save_file(state, path)
    return path


def test_bad_files_are_named_with_the_fix(file, loaded, tmp_path, plain):
    def refuse(change, message):
        path = broken(file, tmp_path, change)
        with pytest.raises((ValueError, RuntimeError), match=message):
            loading.load_diffusion_model(path, Request("nf4"))

    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    refuse(lambda s: s.update({key: s[key].to(torch.float8_e4m3fn)}), "broken.safetensors has fp8")
    refuse(lambda s: s.update({key: s[key].to(torch.int8)}), "quantized already.*I8")
    refuse(
        lambda s: s.update({key: s[key] / 0}), r"layer joint_blocks.0.x_block.mlp.fc1.*NaN or inf"
    )
    refuse(lambda s: s["x_embedder.proj.bias"].fill_(torch.inf), r"x_embedder.proj.bias has NaN")
    refuse(
        lambda s: [s.pop(k) for k in list(s) if "joint" in k or "embed" in k], "no diffusion model"
    )
    path = Path(broken(file, tmp_path, lambda s: None))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"broken.safetensors is cut short"):
        loading.load_diffusion_model(str(path), Request("nf4"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + struct.pack("<I", 3) + bytes(64))
    with pytest.raises(ValueError, match=r"model.gguf is a GGUF file"):
        loading.load_diffusion_model(str(gguf), Request("nf4"))
    with pytest.raises(ValueError, match="model is quantized already"):
        loading.quantize_model(loaded("nf4"), Request("int8"))


def test_the_nodes_say_what_is_wrong_with_a_file_or_a_choice_of_layers(file, tmp_path):
    nodes = importlib.import_module("qsched_pack.nodes.loading")
    paths = importlib.import_module("folder_paths")
    paths.add_model_folder_path("diffusion_models", str(Path(file).parent))
    loader = nodes.QSchedLoadDiffusionModel
    assert loader.validate_inputs(layers="*mlp*=int8") is True
    assert "'*mlp*=q9'" in loader.validate_inputs(layers="*mlp*=q9")
    with pytest.raises(ValueError, match=r"unet_name='none\.safetensors'"):
        loader.execute("none.safetensors", "nf4")
    cut = Path(file).with_name("cut.safetensors")
    cut.write_bytes(Path(file).read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.safetensors is cut short"):
        loader.execute("cut.safetensors", "nf4")
    for node in nodes.NODES:
        node.GET_SCHEMA()
        assert node.define_schema().node_id.startswith("QSched")
    output = nodes.QSchedLoadDiffusionModel.execute("tiny.safetensors", "int2")
    assert "x smaller" in output.args[1]


@pytest.mark.skipif(LOAD_DEVICE.type != "cpu", reason="ComfyUI widens nothing on a GPU")
def test_a_model_that_comfyui_widened_is_as_small_as_from_its_file(loaded, plain, sample):
    """On a CPU ComfyUI loads an fp16 file as fp32: what is kept goes back to fp16, exactly."""
    found, wanted = loading.quantize_model(plain, Request("nf4")), loaded("nf4")
    assert found.model_size() == wanted.model_size()
    assert found.model.get_dtype_inference() == wanted.model.get_dtype_inference()
    assert torch.equal(sample(found), sample(wanted))
    weight = next(v for v in plain.model.diffusion_model.parameters() if v.dtype == torch.float32)
    before = weight.data.clone()
    weight.data[0] += 1e-6  # no 16-bit number now: nothing is narrowed
    try:
        assert loading.quantize_model(plain, Request("nf4")).model_size() > wanted.model_size()
    finally:
        weight.data.copy_(before)
