"""Rounded layers as a safetensors file: codes, tables and biases, and what they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..files import write_atomic
from ..formats import get
from ..formats.base import FormatError, Packed
from ..formats.files import MappedFile
from ..formats.layer_entry import check_tables, is_error, is_options, is_shape
from ..formats.policy import Choice
from ..study.seal import SUM, digest
from ..text import plain, shown
from .layer import Calibrated
from .layers import packed_layer

KEY, VERSION = "qsched_rounding", 2


@dataclass(frozen=True)
class RoundedWeights:
    """Layers by name, how each is stored, and ``provenance`` (plain JSON): what they were made of."""

    layers: Mapping[str, Calibrated]
    chosen: Mapping[str, Choice]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of every code, table and bias, and of what they are."""
        found = hashlib.sha256()
        for name, layer in sorted(self.layers.items()):
            choice, packed = self.chosen[name], layer.packed
            kind = [name, choice.format, choice.weight_only, packed.shape, dict(packed.options)]
            found.update(json.dumps(kind, sort_keys=True).encode())
            biases = {} if layer.bias is None else {"bias": layer.bias}
            for table, data in {"codes": packed.codes, **packed.aux, **biases}.items():
                found.update(f"{name}.{table} {list(data.shape)}\n".encode())
                raw = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                found.update(raw.numpy())
        return found.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        entries = {}
        for name, layer in self.layers.items():
            packed, choice = layer.packed, self.chosen[name]
            for table, data in {"codes": packed.codes, **packed.aux}.items():
                tensors[f"{name}.{table}"] = data.detach().cpu().contiguous().clone()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach().cpu().contiguous().clone()
            entries[name] = {
                "format": choice.format,
                "weight_only": choice.weight_only,
                "shape": list(packed.shape),
                "options": dict(packed.options),
                "errors": [layer.plain_error, layer.error],
                "note": layer.note,
                "remark": layer.remark,
            }
        content = {
            "version": VERSION,
            "layers": entries,
            "provenance": dict(self.provenance),
            "sha256": self.digest,
        }
        content = json.loads(json.dumps(content))  # as it will be read: tuples are lists there
        content[SUM] = digest(content)
        return write_atomic(path, save(tensors, {KEY: json.dumps(content)}))

    @classmethod
    def load(cls, path: str | Path) -> RoundedWeights:
        """The file's content; FormatError names a file that is damaged or of another kind."""
        file, name = MappedFile(path), Path(path).name
        try:
            content = dict(json.loads(file.metadata[KEY]))
            told = content.pop(SUM, None)
            whole = told == digest(content)
            version, entries = content["version"], dict(content["layers"])
            provenance, packed_digest = dict(content["provenance"]), content["sha256"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise FormatError(
                f"{name} has no rounded weights; give a file of qsched_core.calibrate_weights"
            ) from None
        if version != VERSION:
            raise FormatError(
                f"{name} is of version {shown(version)}; this pack reads {VERSION}: make it again"
            )
        if not whole:
            raise FormatError(f"{name} is damaged: its checksum is wrong; make or copy it again")
        layers, chosen = {}, {}
        for layer, entry in entries.items():
            try:
                form = get(entry["format"])
                aux = {table: file.tensor(f"{layer}.{table}").clone() for table in form.aux}
                codes = file.tensor(f"{layer}.codes").clone()
                packed = _packed(codes, aux, entry)
                check_tables(packed, form, layer, name)
                bias = f"{layer}.bias"
                bias = file.tensor(bias).clone() if bias in file.entries else None
                layers[layer] = _calibrated(packed, bias, entry)
                chosen[layer] = Choice(entry["format"], bool(entry["weight_only"]))
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(
                    f"{name}: layer {shown(layer)} is damaged ({plain(str(error), 300)}); make the file again"
                ) from None
        found = cls(layers, chosen, provenance)
        if found.digest != packed_digest:
            raise FormatError(f"{name} is damaged: its checksum is wrong; make or copy it again")
        return found

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the model's layers by the rounded ones, in place.

        FormatError names a layer that the model has not, or has in another shape.
        """
        new = []
        for name, layer in self.layers.items():
            path, _, child = name.rpartition(".")
            try:
                parent = model.get_submodule(path)
                old = getattr(parent, child)
            except AttributeError:
                raise FormatError(f"the model has no layer {name}; give the file's own") from None
            shape = tuple(getattr(old, "weight", torch.empty(0)).shape)
            if shape != layer.packed.shape:
                raise FormatError(
                    f"layer {name} has shape {shape} in the model and {layer.packed.shape} in the "
                    "file; give the file's own model"
                )
            device = old.weight.device
            new.append((parent, child, packed_layer(old, layer.to(device), self.chosen[name])))
        for parent, child, made in new:  # all of them, or none
            setattr(parent, child, made)
        return model


def _packed(codes: torch.Tensor, aux: Mapping[str, torch.Tensor], entry: Mapping) -> Packed:
    """The packing that ``entry`` describes; ValueError for what is no shape or no options."""
    if not is_shape(entry["shape"]) or not is_options(entry["options"]):
        raise ValueError("its shape or its options are not such")
    return Packed(codes, aux, tuple(entry["shape"]), dict(entry["options"]))


def _calibrated(packed: Packed, bias: torch.Tensor | None, entry: Mapping) -> Calibrated:
    errors, note, remark = entry["errors"], entry["note"], entry.get("remark", "")
    sound = isinstance(errors, list) and all(e is None or is_error(e) for e in errors)
    if not sound or len(errors) != 2 or not all(isinstance(t, str) for t in (note, remark)):
        raise ValueError("its errors or its note are not such")
    if bias is not None and (tuple(bias.shape) != packed.shape[:1] or not bias.is_floating_point()):
        raise ValueError("its bias does not go with its shape")
    return Calibrated(packed, bias, *errors, note, remark)
