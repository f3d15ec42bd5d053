"""The kinds of files and texts that are read, and how it is judged what comes of a damaged one.

Every reader either gives a value that the damaged input really says, or raises one of the errors
that its docstring names, with one line of text.  Where a checksum is kept the value must be the sound
one.  What is judged is written here once more, by another way than the reader's.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mutate

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


class DifferentError(Exception):
    """What was read is not what is there."""


@dataclass(frozen=True)
class Kind:
    """One kind of input, and what to do with a damaged one.

    ``read(data, sample)`` tries the mutant ``data`` of sample number ``sample``: True if it was read,
    False if it was refused as documented, and any exception if neither.
    """

    name: str
    samples: Sequence[bytes]
    mutant: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes, int], bool]


def told(error: Exception, most: int = 3000) -> bool:
    """False; DifferentError for a message that no user could be shown."""
    text = str(error)
    if not text or len(text) > most or "\n" in text:
        raise DifferentError(f"its message is empty, long or of several lines: {text[:200]!r}")
    text.encode()
    return False


def same(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise DifferentError(f"{what}: read {str(found)[:200]}, there is {str(wanted)[:200]}")


def header(work: Path) -> Kind:
    """Safetensors files: what opens here opens in the library, to the same tensors."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    from qsched_core.formats import FormatError
    from qsched_core.formats.files import MappedFile

    tensors = {
        "a.weight": torch.arange(8).half().reshape(2, 4),
        "b": torch.tensor(3.5),
        "c.bias": torch.arange(3).bfloat16(),
        "none": torch.zeros(0, 5),
        "d": torch.arange(5, dtype=torch.uint8),
    }
    place = work / "header.safetensors"

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            mapped = MappedFile(place)
            ours = mapped.state_dict()
        except FormatError as error:
            if place.name not in str(error):
                raise DifferentError("the message does not name the file") from error
            return told(error)
        try:
            with safe_open(place, framework="pt") as file:
                same(sorted(ours), sorted(file.keys()), "names")
                same(mapped.metadata, file.metadata() or {}, "metadata")
                for key, tensor in ours.items():
                    theirs = file.get_tensor(key)
                    same((tensor.dtype, tensor.shape), (theirs.dtype, theirs.shape), key)
                    pair = [t.clone().reshape(-1).view(torch.uint8) for t in (tensor, theirs)]
                    same(torch.equal(*pair), True, f"the data of {key}")
        except SafetensorError as error:
            raise DifferentError(f"the library refuses what is read here: {error}") from error
        return True

    plain = save(tensors, {"format": "pt"})
    models = [path.read_bytes() for path in sorted((GOLDEN / "models").glob("*.safetensors"))]
    # most are of the small file: a model's takes ten times as long
    samples = [plain] * 9 + models[:1]
    return Kind("header", samples, mutate.of_safetensors, read)


def entry(work: Path) -> Kind:
    """What a saved file says of one layer (its "comfy_quant")."""
    import torch

    from qsched_core.formats import FormatError
    from qsched_core.formats.layer_entry import FIELDS, read_entry

    def read(data: bytes, sample: int) -> bool:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        try:
            found = read_entry(tensor, "blocks.0.comfy_quant", "m.safetensors")
        except FormatError as error:
            if "m.safetensors" not in str(error) or "blocks.0" not in str(error):
                raise DifferentError("the message names neither file nor layer") from error
            return told(error)
        wanted = {k: v for k, v in json.loads(data).items() if v is not None}
        same(repr(found), repr(wanted), "the entry")
        for name, (fits, _) in FIELDS.items():
            same(name not in found or bool(fits(found[name])), True, name)
        return True

    samples = [
        json.dumps(content).encode()
        for content in (
            {"format": "qsched_nf4", "shape": [64, 128], "sample": "00ff", "error": 0.01,
             "options": {"group": 64, "signed": True}, "params": {}},
            {"format": "int8_tensorwise", "full_precision_matrix_mult": False, "convrot": True},
        )
    ]  # fmt: skip
    return Kind("entry", samples, mutate.of_json, read)


def schedule(work: Path) -> Kind:
    """Schedules: what is read is what another JSON reader finds, and is written back the same."""
    from qsched_core.schedule import QSchedule, ScheduleError

    place = work / "schedule.json"

    def read(data: bytes, sample: int) -> bool:
        place.write_bytes(data)
        try:
            found = QSchedule.load(place)
        except ScheduleError as error:
            return told(error)
        content = json.loads(data.decode("utf-8-sig"))
        trajectory = content.get("trajectory", content)
        same(list(found.sigmas), [float(s) for s in trajectory["sigmas"]], "sigmas")
        for name, values in found.correction.rows().items():
            same(list(values), [float(v) for v in content["correction"][name]], name)
        same(found.flow, trajectory["flow"], "flow")
        same(all(map(math.isfinite, found.sigmas)), True, "finite")
        same(QSchedule.from_json(found.to_json()), found, "written and read again")
        found.describe(), found.at(found.sigmas)
        return True

    samples = [path.read_bytes() for path in sorted((GOLDEN / "schedules").glob("*.json"))]
    samples = [s.removeprefix(b"\xef\xbb\xbf") for s in samples]
    return Kind("schedule", samples, mutate.of_json, read)


PROMPTS = (
    "# people\na red circle\n  two blue squares on a table  \n\na cat, oil on canvas\n[heldout]\n"
    "a green ring\n# more\n\u732b\u3068\u72ac\nun chien \u00e0 la plage\n"
)


def prompts(work: Path) -> Kind:
    """Prompt files, text and JSON: the lines that another reader finds, in their order."""
    from qsched_core.prompts import CalibrationPrompts, PromptError, read_prompts

    def read(data: bytes, sample: int) -> bool:
        place = work / ("prompts.json" if sample else "prompts.txt")
        place.write_bytes(data)
        try:
            found = read_prompts(place)
            made = CalibrationPrompts.of(*found)
        except PromptError as error:
            return told(error)
        if sample:
            content = json.loads(data)
            wanted = [tuple(content[part]) for part in ("calibration", "heldout")]
        else:
            lines = [line.strip() for line in data.decode().splitlines()]
            border = lines.index("[heldout]")
            wanted = [
                tuple(line for line in part if line and not line.startswith("#"))
                for part in (lines[:border], lines[border + 1 :])
            ]
            wanted = [_listed(part) for part in wanted]
        same(list(found), wanted, "prompts")
        same((made.calibration.prompts, made.heldout.prompts), found, "prompt sets")
        same(set(made.calibration.seeds) & set(made.heldout.seeds), set(), "shared seeds")
        return True

    lists = {"calibration": ["a cat", "two dogs", "\u732b"], "heldout": ["a red ring", "a tree"]}
    samples = [PROMPTS.encode(), json.dumps(lists).encode()]

    def mutant(data: bytes, chance: random.Random) -> bytes:
        return (mutate.of_json if data.startswith(b"{") else mutate.of_bytes)(data, chance)

    return Kind("prompts", samples, mutant, read)


def _listed(lines: tuple[str, ...]) -> tuple[str, ...]:
    """A part that is one JSON list of texts stands for its texts."""
    try:
        found = json.loads("\n".join(lines)) if lines and lines[0].startswith("[") else None
    except ValueError:
        return lines
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        return lines
    stripped = (text.strip() for text in found)
    return tuple(text for text in stripped if text and not text.startswith("#"))


def layers(work: Path) -> Kind:
    """Formats by layer: clauses that say the same when they are written again."""
    from qsched_core.formats import FormatError
    from qsched_core.formats.overrides import parse_overrides
    from qsched_core.formats.policy import Policy

    shapes = {"img_in": (64, 64), "blocks.0.mlp.fc1": (256, 64), "final_layer.linear": (64, 64)}

    def read(data: bytes, sample: int) -> bool:
        text = data.decode("utf-8", "surrogateescape")
        try:
            found = parse_overrides(text)
        except FormatError as error:
            return told(error)
        clauses = [c.strip() for c in text.replace("\n", ";").split(";") if c.strip()]
        same(len(found), len(clauses), "clauses")
        for override, clause in zip(found, clauses, strict=True):
            left, _, right = clause.rpartition("=")
            names = tuple(part.strip() for part in left.split("|"))
            same(override.patterns, names, "patterns")
            keeps = right.strip() in ("fp16", "bf16", "keep")
            same(override.format, None if keeps else right.strip(), "format")
        policy = Policy("nf4", found)
        for name, shape in shapes.items():
            policy(name, shape, "linear")
        return True

    samples = [
        b"img_in|final_layer=fp16; *mlp*=nf4",
        b"@conv2d=nf4;blocks.0=int2\n*.fc?=keep; blocks.[0-9]*.mlp=w4a8|",
        b"a=nf4",
    ]
    return Kind("layers", samples, mutate.of_bytes, read)


def formula(work: Path) -> Kind:
    """Objectives as a sum: the weights and scorers that stand there."""
    from qsched_core.objective import recipe_of
    from qsched_core.scorers import ScorerError

    presets = ("clip+clipiqa", "aq+hps")

    def read(data: bytes, sample: int) -> bool:
        text = data.decode("utf-8", "surrogateescape")
        try:
            found = recipe_of(text)
        except ScorerError as error:
            return told(error)
        parts = [part.strip() for part in text.strip().split("+")]
        terms = {t.spec: t.weight for t in (*found.alignment, *found.quality)}
        if text.strip() and "+".join(parts) not in presets and not parts[-1].startswith("pyiqa:"):
            wanted = {}
            for part in parts:
                weight, star, spec = part.rpartition("*")
                wanted[spec.strip()] = float(weight) if star else 1.0
            same(terms, wanted, "terms")
        same(all(0 < w < math.inf for w in terms.values()), True, "weights")
        return True

    samples = [b"clip + 2*clip_iqa + 0.5*pickscore", b"clip+clipiqa", b"aq+hps", b"3*clip"]
    return Kind("formula", samples, mutate.of_bytes, read)


KINDS = {f.__name__: f for f in (header, entry, schedule, prompts, layers, formula)}
