"""LoRAs on a quantized model whose file on disk is not what it was when it was loaded."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from inside import Request, formats, loading, with_lora

files = importlib.import_module("qsched_pack.qsched_core.formats.files")


@pytest.fixture
def copy(file, tmp_path) -> Path:
    return Path(shutil.copy(file, tmp_path / "own.safetensors"))


@pytest.fixture
def model(copy):
    return loading.load_diffusion_model(str(copy), Request("nf4"))


def cut_short(path: Path) -> None:
    os.truncate(path, 4096)


def written_over(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks of file systems are coarse


@pytest.mark.parametrize("change", [cut_short, written_over])
def test_a_changed_file_is_named_and_the_model_goes_on(change, model, copy, sample, lora):
    before = sample(model)
    change(copy)
    with pytest.raises(formats.FormatError, match=r"own\.safetensors was changed on disk"):
        sample(with_lora(model, lora))
    assert torch.equal(sample(model), before)


def test_a_drive_that_fails_in_the_middle_leaves_the_model_as_it_was(
    model, sample, lora, monkeypatch
):
    before, read, calls = sample(model), files.MappedFile.read, []

    def fails(self, tensor):
        calls.append(tensor.shape)
        if len(calls) == 4:
            raise formats.FormatError("own.safetensors can't be read any more")
        return read(self, tensor)

    monkeypatch.setattr(files.MappedFile, "read", fails)
    with pytest.raises(formats.FormatError, match="any more"):
        sample(with_lora(model, lora))
    monkeypatch.undo()
    assert len(calls) == 4 and torch.equal(sample(model), before)


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no file that is open")
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_was_replaced_or_deleted_is_still_read(gone, model, copy, sample, lora):
    wanted = sample(with_lora(model, lora))
    sample(model)  # its own weights are back
    if gone:
        copy.unlink()
    else:
        other = copy.with_name("other")
        other.write_bytes(b"another file")
        other.replace(copy)
    assert torch.equal(sample(with_lora(model, lora)), wanted)


def test_a_file_that_changes_while_it_is_loaded_is_named(copy, monkeypatch):
    utils, calls = importlib.import_module("comfy.utils"), []

    def meanwhile(self, value):  # between two layers
        calls.append(value)
        if len(calls) == 3:
            cut_short(copy)

    monkeypatch.setattr(utils.ProgressBar, "update", meanwhile)
    with pytest.raises(formats.FormatError, match=r"own\.safetensors was changed on disk"):
        loading.load_diffusion_model(str(copy), Request("nf4"))
    assert len(calls) == 3
