"""What a walk keeps on the disk, so that it goes on after a stop and is not done twice."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..files import write_atomic
from ..formats.base import FormatError
from ..formats.files import MappedFile
from ..formats.policy import Choice
from ..study import fingerprint
from .file import RoundedWeights
from .layer import Calibrated
from .proof import Proof

logger = logging.getLogger(__name__)

KEY, PICTURES = "qsched_proof", "pictures"
PREFIX = "rounding-"
KEPT, OLD_SECONDS = 3, 24 * 3600  # other walks that stay, and the age below which all do


class Shelf:
    """A walk's folder: its finished blocks, and in their place all weights when they are there.

    ``key`` stands for everything that the weights depend on.  A damaged file is named in the log, and
    what was in it is made again.
    """

    def __init__(self, folder: Path, key: str, chosen: Mapping[str, Choice]):
        self.folder, self.chosen = folder / f"{PREFIX}{key[:32]}", chosen
        self.path = self.folder / "weights.safetensors"

    def _block(self, name: str) -> Path:
        return self.folder / "blocks" / f"{name}.safetensors"

    def load(self, block: str) -> dict[str, Calibrated] | None:
        found = _intact(self._block(block), f"block {block} is rounded again")
        return None if found is None else dict(found.layers)

    def save(self, block: str, layers: Mapping[str, Calibrated]) -> None:
        RoundedWeights(layers, self.chosen).save(self._block(block))

    def weights(self) -> RoundedWeights | None:
        """What :meth:`keep` kept."""
        return _intact(self.path, "the weights are rounded again")

    def begin(self) -> None:
        """Let go of walks that were not touched for a day, but for the last few."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = [p for p in self.folder.parent.glob(f"{PREFIX}*") if p != self.folder]
        ages = {path: time.time() - _touched(path) for path in others if path.is_dir()}
        for path in sorted(ages, key=ages.__getitem__)[KEPT:]:
            if ages[path] > OLD_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def keep(self, weights: RoundedWeights) -> None:
        """Keep a walk's result, and let go of its blocks."""
        weights.save(self.path)
        shutil.rmtree(self.folder / "blocks", ignore_errors=True)

    def proof(self, judged_by: Mapping[str, Any]) -> tuple[Proof, torch.Tensor | None] | None:
        """The proof that was kept for the same ``judged_by``, and its pictures."""
        path = self._proof(judged_by)
        if not path.exists():
            return None
        try:
            file = MappedFile(path)
            content = json.loads(file.metadata[KEY])
            pictures = file.tensor(PICTURES).clone() if PICTURES in file.entries else None
            if content["sum"] != _sum(content["proof"], pictures):
                raise ValueError("its checksum is wrong")
            return Proof.of(content["proof"]), pictures
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("the proof is made again: %s is damaged (%s)", path.name, error)
            return None

    def keep_proof(
        self, judged_by: Mapping[str, Any], proof: Proof, pictures: torch.Tensor | None
    ) -> None:
        """Keep a proof; ``judged_by`` (plain JSON) says what it depends on beside the weights."""
        tensors = {} if pictures is None else {PICTURES: pictures.contiguous()}
        content = {"proof": proof.whole(), "sum": _sum(proof.whole(), pictures)}
        write_atomic(self._proof(judged_by), save(tensors, {KEY: json.dumps(content)}))

    def _proof(self, judged_by: Mapping[str, Any]) -> Path:
        return self.folder / f"proof-{fingerprint(judged_by)[:32]}.safetensors"


def _touched(folder: Path) -> float:
    """When something in it was last written."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with suppress(OSError):  # it went meanwhile
            times.append(path.stat().st_mtime)
    return max(times)


def _intact(path: Path, otherwise: str) -> RoundedWeights | None:
    """The weights in ``path``, or None; the log says what a damaged file means."""
    if not path.exists():
        return None
    try:
        return RoundedWeights.load(path)
    except FormatError as error:
        logger.warning("%s: %s", otherwise, error)
        return None


def _sum(proof: Mapping[str, Any], pictures: torch.Tensor | None) -> str:
    found = hashlib.sha256(json.dumps(proof, sort_keys=True).encode())
    if pictures is not None:
        found.update(f"{list(pictures.shape)} {pictures.dtype}".encode())
        found.update(pictures.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
