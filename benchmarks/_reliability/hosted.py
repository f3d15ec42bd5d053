"""Kinds that are read on ComfyUI's side: models that were saved, by our loaders, and the early check."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

from . import mutate
from .kinds import GOLDEN, DifferentError, Kind, same, told

FORMATS = ("int2", "int8", "nf4")


def _import(name: str):
    importlib.import_module("benchmarks._host").import_pack()
    return importlib.import_module(f"qsched_pack.{name}")


def _samples() -> list[bytes]:
    return [(GOLDEN / "models" / f"{name}.safetensors").read_bytes() for name in FORMATS]


def _unquantized(work: Path) -> bytes:
    """The first of the samples in fp16, as a file that is to be quantized."""
    loader = _import("nodes.host.weights.loading")
    library = importlib.import_module("safetensors.torch")
    made = loader.load_diffusion_model(
        str(GOLDEN / "models" / "int8.safetensors"), loader.Request("int8")
    )
    weights = {}
    for name, value in made.model.diffusion_model.named_parameters():
        packed = isinstance(value.data, loader.QuantizedTensor)
        weights[name] = (value.data.dequantize() if packed else value.data).half().contiguous()
    return library.save(weights)


def _mutant(data: bytes, chance: random.Random) -> bytes:
    return (mutate.of_safetensors if chance.random() < 0.2 else mutate.of_model)(data, chance)


def model(work: Path) -> Kind:
    """A saved model's file, opened: plain tensors are what the library finds there."""
    files = _import("nodes.host.weights.files")
    formats = _import("qsched_core.formats")
    torch, library = importlib.import_module("torch"), importlib.import_module("safetensors.torch")
    place = work / "model.safetensors"

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            found = files.read_file(str(place), FORMATS[sample], "")
        except formats.FormatError as error:
            return told(error)
        stored = library.load(data)
        for key, tensor in found.state.items():
            if type(tensor) is torch.Tensor and key in stored:
                same((tensor.dtype, tensor.shape), (stored[key].dtype, stored[key].shape), key)
                pair = [t.clone().reshape(-1).view(torch.uint8) for t in (tensor, stored[key])]
                same(torch.equal(*pair), True, f"the data of {key}")
        return True

    return Kind("model", _samples(), _mutant, read)


def loading(work: Path) -> Kind:
    """A saved model's file, all the way to a MODEL."""
    loader = _import("nodes.host.weights.loading")
    formats = _import("qsched_core.formats")
    place, wanted = work / "model.safetensors", (*FORMATS, "nf4")

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            made = loader.load_diffusion_model(str(place), loader.Request(wanted[sample]))
        except formats.FormatError as error:
            return told(error)
        except RuntimeError as error:
            if type(error) is not RuntimeError or "holds no diffusion model" not in str(error):
                raise
            return told(error)
        if not loader.model_info(made)["quantized_layers"]:
            raise DifferentError("nothing of the model is quantized")
        for name, value in made.model.diffusion_model.named_parameters():
            packed = isinstance(value.data, loader.QuantizedTensor)
            weight = value.data.dequantize() if packed else value
            same(bool(weight.isfinite().all()), True, f"{name} is finite")
        return True

    return Kind("loading", [*_samples(), _unquantized(work)], _mutant, read)


def early(work: Path) -> Kind:
    """What is looked at to recommend a format: the file's header, and the entries of its layers."""
    recommended = _import("nodes.host.weights.recommended")
    formats = _import("qsched_core.formats")
    place = work / "model.safetensors"

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            recommended.for_file(str(place), "recommended", "")
        except formats.FormatError as error:
            return told(error)
        return True

    return Kind("early", [*_samples(), _unquantized(work)], _mutant, read)


KINDS = {f.__name__: f for f in (model, loading, early)}
