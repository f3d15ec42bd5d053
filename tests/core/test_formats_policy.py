"""Which layer gets which format, the override string, and what a file's header gives away."""

from __future__ import annotations

import contextlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qsched_core.formats import FormatError, names
from qsched_core.formats.files import check_unquantized
from qsched_core.formats.header import read_header
from qsched_core.formats.policy import Choice, Policy, parse_overrides

SHAPE = (256, 256)
KEPT = [
    "x_embedder",
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "context_embedder",
    "t_embedder.mlp.2",
    "y_embedder.mlp.0",
    "time_embed.0",
    "label_emb.0.0",
    "time_text_embed.timestep_embedder.linear_1",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
    "proj_out",
    "norm_out.linear",
    "out.2",
    "head.head",
]
MODULATION = [
    "joint_blocks.3.x_block.adaLN_modulation.1",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.txt_mod.lin",
    "single_blocks.7.modulation.lin",
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.0.norm1_context.linear",
    "single_transformer_blocks.0.norm.linear",
    "input_blocks.1.0.emb_layers.1",
]
ORDINARY = [
    "joint_blocks.0.x_block.attn.qkv",
    "double_blocks.0.img_mlp.0",
    "single_blocks.0.linear1",
    "layers.3.attention.out",
    "input_blocks.4.1.proj_in",
    "input_blocks.4.1.proj_out",
    "output_blocks.3.1.transformer_blocks.0.ff.net.2",
    "middle_block.1.transformer_blocks.0.attn2.to_out.0",
    "noise_refiner.0.feed_forward.w2",
]


@pytest.mark.parametrize("name", names())
def test_defaults(name):
    policy = Policy(name)
    assert {layer: policy(layer, SHAPE).format for layer in KEPT} == dict.fromkeys(KEPT)
    assert {policy(layer, SHAPE) for layer in ORDINARY} == {Choice(name)}
    modulation = Choice("nf4" if name in ("int2", "int3") else name, weight_only=True)
    assert {policy(layer, SHAPE) for layer in MODULATION} == {modulation}


def test_small_and_unknown_layers_are_kept():
    policy = Policy("nf4")
    assert policy("blocks.0.qkv", (16, 16)) == Choice(None, why="small")
    assert policy("blocks.0.conv", (64, 64, 3, 3), "conv2d") == Choice("nf4")
    assert policy("input_blocks.0.0", (320, 4, 3, 3), "conv2d").format is None
    native = Policy("int8")("blocks.0.conv", (64, 64, 3, 3), "conv2d")
    assert native == Choice(None, why="int8 is for linear")


def test_overrides():
    policy = Policy(
        "int2", parse_overrides("img_in|final_layer=fp16; *mlp*=nf4; blocks.0.mlp=int8;")
    )
    assert policy("blocks.0.attn.qkv", SHAPE) == Choice("int2")
    assert policy("blocks.1.mlp.fc1", SHAPE) == Choice("nf4")
    assert policy("blocks.0.mlp.fc1", SHAPE) == Choice("int8"), "the last clause wins"
    assert policy("blocks.10.mlp.fc1", SHAPE) == Choice("nf4"), "blocks.0 is no part of blocks.10"
    assert Policy("nf4", parse_overrides("img_in=int8"))("img_in", SHAPE) == Choice("int8")
    assert Policy("int8", parse_overrides("*mod*=w4a8"))("b.img_mod.lin", SHAPE).weight_only
    assert policy.unmatched({"img_in": "linear", "x.mlp": "linear"}) == [
        "final_layer",
        "blocks.0.mlp",
    ]


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("img_in", "img_in"),
        ("img_in=", "img_in="),
        ("=nf4", "=nf4"),
        ("a|=nf4", "a|=nf4"),
        ("*mlp*=nf4; img_in=q8", "img_in=q8"),
        ("img_in=nf4, txt_in=int8", "img_in=nf4, txt_in=int8"),
        ("img_in txt_in=nf4", "img_in txt_in=nf4"),
    ],
)
def test_a_bad_override_names_its_clause(text, clause):
    with pytest.raises(FormatError, match="layers: ") as error:
        parse_overrides(text)
    assert repr(clause) in str(error.value)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(FormatError):
        Policy("nf4", parse_overrides(text))("blocks.0.qkv", SHAPE)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "*b*", "a.b|c"]), st.sampled_from(["keep", "nf4", "int2"])),
        max_size=4,
    )
)
def test_a_description_reads_back(clauses):
    text = "; ".join(f"{pattern}={value}" for pattern, value in clauses)
    policy = Policy("int8", parse_overrides(text))
    assert parse_overrides(policy.describe()) == policy.overrides


def write(tmp_path, tensors, metadata=None):
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata)
    return path


def test_header_of_a_sound_file(tmp_path):
    path = write(tmp_path, {"a.weight": torch.ones(4, 8).half()}, {"k": "v"})
    tensors, metadata = read_header(path)
    assert metadata == {"k": "v"}
    assert tensors["a.weight"].shape == (4, 8) and tensors["a.weight"].nbytes == 64
    check_unquantized(tensors, metadata, "m")


def test_broken_files_are_named(tmp_path):
    path = write(tmp_path, {"a.weight": torch.ones(64, 64)})
    whole = path.read_bytes()
    cases = {
        "cut short": whole[:-10],
        "cut short: it has 30": whole[:30],
        "empty or cut short": b"abc",
        "not a safetensors": b"PK\x03\x04" + bytes(range(200, 232)),
        "GGUF": b"GGUF" + bytes(100),
        "damaged safetensors header": struct.pack("<Q", 20) + b"{" * 20,
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(FormatError, match=message) as error:
            read_header(path)
        assert "m.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("b.weight", torch.ones(4, 4).to(torch.float8_e4m3fn), "fp8"),
        ("b.weight", torch.ones(4, 4, dtype=torch.int8), "b.weight is I8"),
        ("b.weight.absmax", torch.ones(4), "bitsandbytes"),
        ("b.comfy_quant", torch.ones(4, dtype=torch.uint8), "ComfyUI"),
        ("b.qweight", torch.ones(4, 4, dtype=torch.int32), "GPTQ"),
    ],
)
def test_quantized_files_are_refused(tmp_path, key, tensor, message):
    tensors, metadata = read_header(write(tmp_path, {"a.weight": torch.ones(4, 4), key: tensor}))
    with pytest.raises(FormatError, match=message):
        check_unquantized(tensors, metadata, "m.safetensors")


def test_quantization_metadata_is_refused():
    with pytest.raises(FormatError, match="metadata"):
        check_unquantized({}, {"_quantization_metadata": "{}"}, "m.safetensors")
