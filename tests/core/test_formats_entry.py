"""What a saved file says of its layers: junk is one FormatError that names file and layer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.formats import FormatError, Packed, get
from qsched_core.formats.layer_entry import check_stored, check_tables, read_entry

KEY = "blocks.0.attn.comfy_quant"
GOOD = {
    "format": "qsched_int2", "shape": [8, 16], "sample": "00ff", "error": 0.25,
    "options": {"a": 1}, "params": {}, "full_precision_matrix_mult": True, "convrot": False,
}  # fmt: skip


def tensor(content) -> torch.Tensor:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def read(content):
    return read_entry(tensor(content), KEY, "m.safetensors")


def test_a_sound_entry_is_what_was_written():
    assert read({**GOOD, "theirs": [1], "group": None}) == {**GOOD, "theirs": [1]}


JUNK = {
    "no JSON": (b"\x93junk", "no JSON"),
    "5000 brackets": (b"[" * 5000, "no JSON"),
    "a list": ([1], "no JSON object"),
    "a number": (7, "no JSON object"),
    "a format that is a number": ({**GOOD, "format": 7}, "'format'"),
    "a shape that is a text": ({**GOOD, "shape": "8x16"}, "'shape'"),
    "a shape of floats": ({**GOOD, "shape": [8.0, 16]}, "'shape'"),
    "a shape of bools": ({**GOOD, "shape": [True, 16]}, "'shape'"),
    "a negative shape": ({**GOOD, "shape": [-8, -16]}, "'shape'"),
    "a shape of one": ({**GOOD, "shape": [128]}, "'shape'"),
    "a sample that is no bytes": ({**GOOD, "sample": "0g"}, "'sample'"),
    "a sample that is a list": ({**GOOD, "sample": [0]}, "'sample'"),
    "an error that is a text": ({**GOOD, "error": "0.1"}, "'error'"),
    "an error of 400 digits": ({**GOOD, "error": 10**400}, "'error'"),
    "an error that is no number": ({**GOOD, "error": float("nan")}, "'error'"),
    "options that are a list": ({**GOOD, "options": [1]}, "'options'"),
    "options of lists": ({**GOOD, "options": {"a": [1]}}, "'options'"),
    "params that are a text": ({**GOOD, "params": "x"}, "'params'"),
    "a text for a flag": ({**GOOD, "full_precision_matrix_mult": "no"}, "'full_precision"),
    "a rotation that is a text": ({**GOOD, "convrot": "no"}, "'convrot'"),
}


@pytest.mark.parametrize("case", JUNK)
def test_junk_names_file_and_layer(case):
    content, says = JUNK[case]
    with pytest.raises(FormatError, match=rf"^m\.safetensors: layer 'blocks\.0\.attn': .*{says}"):
        read(content)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(4), torch.ones(4).bfloat16(), torch.empty(0, dtype=torch.uint8),
        torch.zeros(1 << 21, dtype=torch.uint8),
    ],
)  # fmt: skip
def test_a_tensor_that_is_no_text_names_file_and_layer(content):
    with pytest.raises(FormatError, match=r"^m\.safetensors: layer 'blocks\.0\.attn': .*no text"):
        read_entry(content, KEY, "m.safetensors")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "other"]), VALUES) | VALUES | st.binary(min_size=1))
def test_any_entry_is_read_or_refused_with_one_error(content):
    try:
        found = read(content)
    except FormatError as error:
        assert "m.safetensors: layer 'blocks.0.attn'" in str(error)
        return
    bytes.fromhex(found.get("sample", ""))
    assert all(size > 0 for size in found.get("shape", []))
    assert isinstance(found.get("params", {}), dict) and isinstance(found.get("options", {}), dict)


def test_codes_must_be_able_to_hold_the_weight():
    codes = torch.zeros(8, 4, dtype=torch.uint8)
    check_stored(Packed(codes, {}, (8, 16)), KEY, "m.safetensors", True)
    for shape in ((8, 10**9), (7, 16), (8, 3, 10**4, 10**4)):
        with pytest.raises(FormatError, match=r"^m\.safetensors: layer 'blocks.*no weight of the"):
            check_stored(Packed(codes, {}, shape), KEY, "m.safetensors", True)
    with pytest.raises(FormatError):
        check_stored(Packed(torch.zeros((), dtype=torch.uint8), {}, (1, 1)), KEY, "m", True)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int2", "int3", "w4a8", "llm_int8"])
def test_tables_that_are_too_short_never_reach_a_kernel(name):
    """bitsandbytes reads as many scales as the codes need, whether they are there or not."""
    form = get(name)
    packed = form.quantize(torch.randn(8, 256))
    check_tables(packed, form, KEY, "m.safetensors")
    check_tables(form.quantize(torch.randn(8, 3, 3, 3)), form, KEY, "m.safetensors")
    short = (
        packed.aux["scale"][:, :0],
        packed.aux["scale"][:1],
        packed.aux["scale"].float().double(),
    )
    hostile = [replace(packed, aux={**packed.aux, "scale": scale}) for scale in short]
    hostile += [replace(packed, codes=packed.codes[:, :-1]), replace(packed, shape=(8, 255 * 4))]
    for wrong in hostile:
        with pytest.raises(
            FormatError, match=r"^m\.safetensors: layer 'blocks.*get the file again"
        ):
            check_tables(wrong, form, KEY, "m.safetensors")


def test_a_format_that_can_t_pack_here_has_no_tables_to_compare():
    class Elsewhere(type(get("nf4"))):
        def available(self, device):
            return "it needs another machine"

        def quantize(self, *_, **__):
            raise AttributeError("no such kernel")

    packed = Packed(torch.zeros(8, 128, dtype=torch.uint8), {}, (8, 256))
    check_tables(packed, Elsewhere(), KEY, "m.safetensors")
