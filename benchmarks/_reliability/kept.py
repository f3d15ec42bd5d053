"""Kinds of what this pack keeps itself, with a checksum: a damaged value is never taken."""

from __future__ import annotations

import itertools
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from . import mutate
from .kinds import GOLDEN, DifferentError, Kind, same, told

NAME = "0e74d89ace355b0ccb8ccf394056e3b0ed591436edefdf945fc9b3e0a43027bc"
CONTENT = {"solver": "euler", "budget": 8}
NOTE = {"steps": [0.0672, 0.1118], "nfe": 24}
STAGES = ("ramp", "heldout 03aee5071e4f99e9")


def planted() -> dict:
    """Trials by stage and slot."""
    import optuna

    from qsched_core.objective import Scores
    from qsched_core.study import Record

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def record(slot: int, point: dict) -> Record:
        jaq = (1.25 + slot, 2.5)
        return Record(slot, point, Scores(jaq, (0.5, 0.25), jaq, {"a": jaq}), 0.125, 16, slot == 2)

    point = {"c_x start": 0.9, "c_eps start": 1.0}
    return {
        STAGES[0]: {i: record(i, {k: v + i / 16 for k, v in point.items()}) for i in range(3)},
        STAGES[1]: {i: record(i, {}) for i in range(2)},
    }


def fill(store, trials: dict) -> None:
    from qsched_core.search.space import NOTHING, RampSpace
    from qsched_core.trajectory import Trajectory

    ramp = RampSpace(Trajectory.of((1.0, 0.9, 0.75, 0.5, 0.0)))
    for stage, records in trials.items():
        space = ramp if stage == STAGES[0] else NOTHING
        with store.claim(stage, space, {i: r.point for i, r in records.items()}) as claim:
            for each in records.values():
                claim.finish(each)
    store.put("precheck", NOTE)


def judge(store, trials: dict) -> bool:
    """Whether all is there; DifferentError if anything is that was not kept."""
    whole = True
    for stage, wanted in trials.items():
        found = store.records(stage)
        if not found.items() <= wanted.items():
            raise DifferentError(f"{stage}: a trial is read that was not kept: {str(found)[:300]}")
        whole &= len(found) == len(wanted)
    note = store.get("precheck")
    same(note in (None, NOTE), True, "the note")
    return whole and note is not None


def study(work: Path) -> Kind:
    """The journal of a search."""
    from qsched_core.study import CalibrationError, Journal
    from qsched_core.study.journal import journal_path

    _quick(Journal)
    trials, place = planted(), journal_path(work, NAME)
    with Journal(work, NAME) as journal:
        fill(journal, trials)

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            with Journal(work, NAME) as journal:
                return judge(journal, trials)
        except CalibrationError as error:
            return told(error)

    def mutant(data, chance):
        return (mutate.any_byte if chance.random() < 0.7 else mutate.of_bytes)(data, chance)

    return Kind("study", [place.read_bytes()], mutant, read)


def shared(work: Path) -> Kind:
    """The SQLite file of a study that several servers share."""
    from qsched_core.study import COMMAND_LINE, CalibrationError, SharedStore
    from qsched_core.study import shared as module

    module.PATIENCE = (0.001,)  # nobody else is at the file: there is nothing to wait for
    trials, first, numbers = planted(), work / "first.db", itertools.count()
    with SharedStore(COMMAND_LINE.database(f"sqlite:///{first}"), "x", CONTENT) as store:
        fill(store, trials)
    with closing(sqlite3.connect(first)) as connection:
        connection.execute("pragma journal_mode=delete")

    def read(data: bytes, sample: int) -> bool:
        place = work / f"{next(numbers)}.db"  # the library keeps connections by name
        place.write_bytes(data)
        try:
            with SharedStore(COMMAND_LINE.database(f"sqlite:///{place}"), "x", CONTENT) as store:
                return judge(store, trials)
        except CalibrationError as error:
            return told(error)
        finally:
            for path in work.glob(f"{place.name}*"):
                with suppress(OSError):
                    path.unlink()

    return Kind("shared", [first.read_bytes()], mutate.any_byte, read)


def evaluation(work: Path) -> Kind:
    """A part of an evaluation: scores, features and pictures."""
    import torch

    from qsched_core.evaluation.study import ArmStudy, Part

    part = Part(0, planted()[STAGES[0]][0].scores, 0.125, 16)
    arm, features = ArmStudy(work / "arm"), {"tower": torch.arange(6.0).reshape(2, 3)}
    arm.keep(part, features, torch.rand(2, 4, 4, 3, generator=torch.manual_seed(0)))
    pictures = arm.pictures(part, range(2))
    (place,) = (work / "arm").glob("part-*")

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        found = arm.load(0, 2, ["tower"])
        if found is None:
            return False
        same(found, part, "the part")
        same(torch.equal(arm.features(part, "tower"), features["tower"]), True, "features")
        same(torch.equal(arm.pictures(part, range(2)), pictures), True, "pictures")
        return True

    def mutant(data, chance):
        return (mutate.any_byte if chance.random() < 0.5 else mutate.of_safetensors)(data, chance)

    return Kind("evaluation", [place.read_bytes()], mutant, read)


def features(work: Path) -> Kind:
    """The features of reference pictures that an evaluation keeps."""
    import torch

    from qsched_core.evaluation.study import keep_features, kept_features

    kept, place = torch.arange(6.0).reshape(2, 3), work / "features.safetensors"
    keep_features(place, kept)

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        found = kept_features(place)
        if found is not None:
            same(torch.equal(found, kept), True, "features")
        return found is not None

    return Kind("features", [place.read_bytes()], mutate.of_safetensors, read)


def rounding(work: Path) -> Kind:
    """Calibrated weights: codes, tables, biases, and what they were made of."""
    import torch

    from qsched_core.formats import FormatError, get
    from qsched_core.formats.policy import Choice
    from qsched_core.rounding import RoundedWeights
    from qsched_core.rounding.layer import plain

    random = torch.Generator().manual_seed(0)
    layers = {
        name: plain(
            get(form), torch.randn(8, 64, generator=random), torch.randn(8, generator=random), "why"
        )
        for name, form in (("blocks.0.q", "int2"), ("blocks.1.q", "nf4"))
    }
    chosen = {"blocks.0.q": Choice("int2", False), "blocks.1.q": Choice("nf4", True)}
    provenance = {"format": "int2", "seed": 0, "proof": {"plain": 0.05, "calibrated": 0.007}}
    sound, place = RoundedWeights(layers, chosen, provenance), work / "weights.safetensors"
    sound.save(place)

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            found = RoundedWeights.load(place)
        except FormatError as error:
            if place.name not in str(error):
                raise DifferentError("the message does not name the file") from error
            return told(error)
        same(found.digest, sound.digest, "codes, tables and biases")
        same(dict(found.provenance), provenance, "provenance")
        for name, layer in sound.layers.items():
            for field in ("plain_error", "error", "note"):
                same(getattr(found.layers[name], field), getattr(layer, field), f"{name}: {field}")
        return True

    def mutant(data, chance):
        return (mutate.any_byte if chance.random() < 0.5 else mutate.of_safetensors)(data, chance)

    return Kind("rounding", [place.read_bytes()], mutant, read)


def scorer(work: Path) -> Kind:
    """A scorer's weights, of safetensors and of torch, which runs no code of theirs."""
    import io

    import torch
    from safetensors.torch import save

    from qsched_core.scorers import ScorerError
    from qsched_core.scorers.weights import read_weights

    weights = {"visual.proj": torch.arange(6.0).reshape(2, 3), "logit_scale": torch.tensor(2.5)}
    buffer = io.BytesIO()
    torch.save({"state_dict": weights}, buffer)

    def read(data: bytes, sample: int) -> bool:
        place = work / ("scorer.pt" if sample else "scorer.safetensors")
        place.write_bytes(data)
        try:
            found = read_weights(place)
        except ScorerError as error:
            return told(error)
        for value in found.values():
            same(value.is_floating_point() and not bool(torch.isfinite(value).all()), False, "nan")
        return True

    def mutant(data, chance):
        kind = mutate.of_bytes if data[:2] == b"PK" else mutate.of_safetensors
        return kind(data, chance)

    return Kind("scorer", [save(weights), buffer.getvalue()], mutant, read)


def picture(work: Path) -> Kind:
    """Reference pictures in a folder."""
    import io

    import numpy as np
    from PIL import Image

    from qsched_core.cli.evaluate import read_pictures

    folder = work / "pictures"
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    samples = []
    for form in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        samples.append(buffer.getvalue())

    def read(data: bytes, sample: int) -> bool:
        place = folder / f"a{('.png', '.jpg', '.webp', '.bmp')[sample]}"
        for old in folder.iterdir():
            old.unlink()
        place.write_bytes(data)
        try:
            found = read_pictures(folder)
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            return told(error)
        same((found.ndim, found.shape[-1]), (4, 3), "shape")
        return True

    return Kind("picture", samples, mutate.of_bytes, read)


def _quick(journal) -> None:
    """Nothing here is to outlive a power cut, or to ask for room."""
    journal._check_folder = lambda self: None
    os.fsync = lambda file: None


KINDS = {f.__name__: f for f in (study, shared, evaluation, features, rounding, scorer, picture)}
__all__ = ["GOLDEN", "KINDS"]
