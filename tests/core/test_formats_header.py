"""Headers of safetensors files: one FormatError for any damage, and what opens is what is there."""

from __future__ import annotations

import errno
import json
import math
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qsched_core.formats import FormatError
from qsched_core.formats.files import MappedFile

SHAPES = {"a.weight": [2, 4], "b": [], "c.bias": [3], "none": [0, 5], "d": [5]}
KINDS = {"a.weight": "F16", "b": "F32", "c.bias": "BF16", "none": "F32", "d": "U8"}
BYTES = {"F16": 2, "F32": 4, "BF16": 2, "U8": 1}
SETTINGS = settings(
    max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sound():
    """A header of five tensors, one of them empty and one unaligned, and the bytes of their data."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in SHAPES.items():
        size = BYTES[KINDS[key]] * math.prod(shape)
        header[key] = {"dtype": KINDS[key], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return json.dumps(header).encode(), bytes(range(1, place + 1))


SOUND, DATA = sound()


def write(path, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(start, end, shape=(4,), dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def raw_entry(numbers, shape="[4]", name="x"):
    return f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{numbers}}}}}'.encode()


DAMAGES = {
    "a negative start": ({"x": entry(-8, 8)}, "'x': its data_offsets"),
    "a shape of more bytes than there are": ({"x": entry(0, 16, [40])}, "'x': its shape"),
    "a shape of fewer": ({"x": entry(0, 16, [2])}, "'x': its shape .* takes 8 bytes"),
    "an overlap": ({"w": entry(0, 16), "x": entry(8, 24)}, "'x' overlaps"),
    "the same bytes twice": ({"w": entry(0, 16), "x": entry(0, 16)}, "'x' overlaps"),
    "a gap": ({"w": entry(0, 4, [1]), "x": entry(8, 24)}, "'x' leaves a gap"),
    "a gap at the start": ({"x": entry(4, 20)}, "'x' leaves a gap"),
    "bytes of no tensor": ({"x": entry(0, 8, [2])}, "belong to none"),
    "an end before the start": ({"x": entry(16, 0)}, "'x': its shape"),
    "a float": ({"x": entry(0.0, 16)}, "'x': its data_offsets"),
    "a bool": ({"x": entry(False, 16)}, "'x': its data_offsets"),
    "a float in the shape": ({"x": entry(0, 16, [4.0])}, "'x': its shape"),
    "a bool in the shape": ({"x": entry(0, 4, [True])}, "'x': its shape"),
    "a text in the shape": ({"x": entry(0, 16, ["4"])}, "'x': its shape"),
    "a negative size": ({"x": entry(0, 16, [-2, -2])}, "'x': its shape"),
    "a text as shape": ({"x": entry(0, 16, "4")}, "'x': its shape"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, "'x': it has no 'shape'"),
    "three offsets": ({"x": {**entry(0, 16), "data_offsets": [0, 16, 16]}}, "'x': its data_off"),
    "offsets of null": ({"x": {**entry(0, 16), "data_offsets": None}}, "'x': its data_offsets"),
    "an unknown dtype": ({"x": entry(0, 16, dtype="F33")}, "'x': its dtype is 'F33'"),
    "a dtype that is a list": ({"x": entry(0, 16, dtype=["F32"])}, "'x': its dtype"),
    "an overflow": ({"x": entry(0, 16, [2**62, 4])}, "'x': its shape .* too large"),
    "an overflow to nothing": ({"x": entry(0, 0, [0, 2**62, 4])}, "'x': its shape .* too large"),
    "65 dimensions": ({"x": entry(0, 4, [1] * 65)}, "'x': its shape has 65"),
    "an entry that is a list": ({"x": ["F32", [4], [0, 16]]}, "'x': it is described by"),
    "an entry that is null": ({"x": None}, "'x': it is described by"),
    "something nested": ({"x": entry(0, 16, more=[[]])}, "'x': 'more' is unknown"),
    "a list as header": (b"[1, 2]", "no JSON object"),
    "a number as header": (b"12", "no JSON object"),
    "a header that is cut": (raw_entry("[0,16]")[:-3], "damaged"),
    "a header that is no UTF-8": (b'{"\xff":1}', "damaged"),
    "a header in UTF-16": (raw_entry("[0,16]").decode().encode("utf-16"), "damaged"),
    "a name of half a character": (raw_entry("[0,16]", name="\\ud800"), "is no text"),
    "a key that is there twice": (
        raw_entry("[0,16]")[:-1] + b"," + raw_entry("[0,16]", "[2,2]")[1:],
        "'x' is there twice",
    ),
    "a field that is there twice": (raw_entry('[0,16],"dtype":"F32"'), "'x': 'dtype' is there"),
    "a number of 5000 digits": (raw_entry("[0,16]", f"[{'9' * 5000}]"), "'x': its shape"),
    "a minus zero": (raw_entry("[-0,16]"), "'x': its data_offsets"),
    "no number": (raw_entry("[NaN,16]"), "NaN"),
    "100 000 brackets": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "100 000 braces": (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "metadata that is a list": ({"__metadata__": [], "x": entry(0, 16)}, "__metadata__ is no"),
    "metadata of a number": ({"__metadata__": {"v": 1}, "x": entry(0, 16)}, "__metadata__.*'v'"),
    "metadata twice": (b'{"__metadata__":{"v":"1","v":"2"}}', "__metadata__ has 'v' twice"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_one_error_with_the_file_and_the_tensor(tmp_path, damage):
    header, says = DAMAGES[damage]
    path = write(tmp_path / "m.safetensors", header, bytes(16))
    with pytest.raises(FormatError, match=says) as error:
        MappedFile(path).state_dict()
    assert str(error.value).startswith("m.safetensors ") and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused(tmp_path, length):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + bytes(64))
    with pytest.raises(FormatError, match=r"m\.safetensors is not a safetensors file"):
        MappedFile(path)


def test_a_name_in_a_message_is_short_and_escaped(tmp_path):
    name = "\x1b[31m\n" + "x" * 10_000
    with pytest.raises(FormatError) as error:
        MappedFile(write(tmp_path / "m.safetensors", {name: entry(0, 17)}, bytes(17)))
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_empty_tensors_may_lie_anywhere(tmp_path, place):
    tensors = [("w", entry(0, 8, [2])), ("x", entry(8, 16, [2]))]
    start = 8 * place
    tensors.insert(place, ("none", entry(start, start, [3, 0])))
    path = write(tmp_path / "m.safetensors", dict(tensors), bytes(range(16)))
    assert_as_the_library(path)
    assert MappedFile(path).tensor("none").shape == (3, 0)


def test_every_dtype_of_torch_reads_as_the_library_reads_it(tmp_path):
    raw = torch.arange(48, dtype=torch.uint8)
    names = """float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu
    float8_e4m3fnuz float8_e5m2fnuz complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8"""
    tensors = {name: raw.clone().view(getattr(torch, name)) for name in names.split()}
    path = tmp_path / "m.safetensors"
    save_file({**tensors, "bool": raw % 2 == 0}, path)
    assert set(assert_as_the_library(path)) == {*tensors, "bool"}


def test_a_dtype_that_torch_does_not_have_names_its_tensor(tmp_path):
    path = write(tmp_path / "m.safetensors", {"x": entry(0, 12, [16], "F6_E2M3")}, bytes(12))
    with pytest.raises(FormatError, match=r"m\.safetensors: tensor 'x' has the dtype F6_E2M3"):
        MappedFile(path).state_dict()


def assert_as_the_library(path):
    """What opens here opens there, to the same tensors; returned: their names."""
    mapped = MappedFile(path)
    ours = mapped.state_dict()
    with safe_open(path, framework="pt") as file:
        assert sorted(ours) == sorted(file.keys())
        assert mapped.metadata == (file.metadata() or {})
        for key, tensor in ours.items():
            theirs = file.get_tensor(key)
            assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
            same = torch.equal(
                tensor.clone().reshape(-1).view(torch.uint8),
                theirs.clone().reshape(-1).view(torch.uint8),
            )
            assert same, key
    return ours


def refused(path):
    try:
        with safe_open(path, framework="pt"):
            return False
    except SafetensorError:
        return True


def hold_against_the_library(path):
    """Opened: as the library opens it.  Refused: with a FormatError of one line."""
    try:
        assert_as_the_library(path)
    except FormatError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return False
    return True


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.sampled_from(["F32", "U8", "F64", "BOOL", "F4", "x"]), st.builds(list), st.builds(dict),
    st.lists(st.integers(-3, 40), max_size=3), st.builds(lambda: [[[]]]),
)  # fmt: skip
WHERE = st.tuples(
    st.sampled_from([*SHAPES, "__metadata__", "new"]),
    st.sampled_from(["", "dtype", "shape", "data_offsets", "format", "more"]),
    st.one_of(st.none(), st.integers(0, 2)),
)


@SETTINGS
@given(changes=st.lists(st.tuples(WHERE, JUNK), min_size=1, max_size=3))
def test_a_header_with_changed_values_raises_nothing_else(tmp_path, changes):
    header = json.loads(SOUND)
    for (key, field, index), value in changes:
        owner, place = header, key
        if field and isinstance(owner.get(key), dict):
            owner, place = owner[key], field
            if index is not None and isinstance(owner.get(field), list):
                owner, place = owner[field], min(index, max(0, len(owner[field]) - 1))
                if not owner:
                    owner.append(value)
        owner[place] = value
    path = write(tmp_path / "m.safetensors", header, DATA)
    hold_against_the_library(path)


@SETTINGS
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(SOUND)),
            st.integers(0, 3),
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"-", b"0", b'"', b"[", b"}", b",", b"1e3"])
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_header_with_changed_bytes_raises_nothing_else(tmp_path, edits):
    raw = SOUND
    for place, cut, put in edits:
        raw = raw[:place] + put + raw[place + cut :]
    hold_against_the_library(write(tmp_path / "m.safetensors", raw, DATA))


NUMBERS = st.integers(0, 12)


@SETTINGS
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(["F32", "F16", "U8"]), st.lists(NUMBERS, max_size=2), NUMBERS),
        max_size=3,
    ),
    size=st.integers(0, 24),
    moved=st.booleans(),
)
def test_what_the_library_refuses_is_refused_and_what_it_takes_is_taken(
    tmp_path, tensors, size, moved
):
    """Places and shapes near to sound ones, in any order."""
    header, place = {}, 0
    for number, (dtype, shape, shift) in enumerate(tensors):
        count = BYTES[dtype] * math.prod(shape)
        start = place + (shift if moved else 0)
        header[f"t{number}"] = entry(start, start + count, shape, dtype)
        place += count
    path = write(tmp_path / "m.safetensors", header, bytes(size if moved else place))
    assert hold_against_the_library(path) == (not refused(path))


def test_a_tensor_is_read_as_it_lies_in_the_file(tmp_path):
    found = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    path = tmp_path / "m.safetensors"
    save_file({"a": found, "b": torch.arange(5, dtype=torch.int8)}, path)
    mapped = MappedFile(path)
    view = mapped.tensor("a")
    for part in (view, view.T, view[1:3, 2:5], view[:0], view[2, 3]):
        copy = mapped.read(part)
        assert torch.equal(copy, part) and copy.dtype == part.dtype
        assert not mapped.owns(copy)
    assert torch.equal(mapped.read(mapped.tensor("b")), torch.arange(5, dtype=torch.int8))


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_file_cut_short_or_grown_since_is_named(size, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    mapped = MappedFile(path)
    os.truncate(path, size)
    with pytest.raises(
        FormatError, match=rf"m\.safetensors was changed.*4\d\d\d bytes.*{size} now"
    ):
        mapped.read(mapped.tensor("a"))


@pytest.mark.parametrize("call", ["fstat", "read"])
def test_a_drive_that_was_unplugged_is_named(call, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    mapped = MappedFile(path)

    def gone(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fstat", gone) if call == "fstat" else (mapped, "_fill", gone)))
        with pytest.raises(FormatError) as told:
            mapped.read(mapped.tensor("a"))
    assert "m.safetensors can't be read any more" in str(told.value)


def test_a_long_shape_is_not_shown_whole(tmp_path):
    info = {"dtype": "F32", "shape": [2**62] * 64, "data_offsets": [0, 4]}
    text = json.dumps({"a": info}).encode()
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(FormatError, match=r"^long\.safetensors.*tensor 'a': its shape") as error:
        MappedFile(path)
    assert len(str(error.value)) < 400
