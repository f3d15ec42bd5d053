"""A disk that is full at some point: the error says so, nothing is left, and it goes on afterwards.

The disk is a small one in memory, mounted for this; where that is not allowed nothing is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import kept
from .cases import Failure, Outcome, Setting

ATTACK = "disk"
SIZE, PAGE = 64 << 20, 4096


def why_not() -> str:
    """Why no disk can be mounted here; "" if one can."""
    if not hasattr(os, "geteuid") or not Path("/proc/mounts").exists():
        return "needs Linux, for a disk in memory"
    try:
        with small_disk():
            return ""
    except OSError as error:
        return f"no disk may be mounted here ({error})"


@contextmanager
def small_disk() -> Iterator[Path]:
    """An empty file system of ``SIZE`` bytes; OSError where none may be mounted."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip() or f"mount: exit status {done.returncode}")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def _file(folder: Path, seed: str) -> Any:
    from qsched_core.files import write_atomic

    data = random.Random(seed).randbytes(random.Random(seed).randrange(1, 3 << 20))
    path = write_atomic(folder / "file.bin", data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _schedule(folder: Path, seed: str) -> Any:
    from qsched_core.schedule import QSchedule
    from qsched_core.trajectory import Trajectory

    made = QSchedule.identity(Trajectory.of((1.0, 0.9, 0.75, 0.5, 0.0)))
    return QSchedule.load(made.save(folder / "schedule.json")).to_json()


def _study(folder: Path, seed: str) -> Any:
    from qsched_core.study import Journal

    wanted = kept.planted()
    with Journal(folder, kept.NAME) as journal:
        missing = {
            stage: {i: r for i, r in records.items() if i not in journal.records(stage)}
            for stage, records in wanted.items()
        }
        kept.fill(journal, missing)
        return {stage: journal.records(stage) for stage in wanted}, journal.get("precheck")


def _evaluation(folder: Path, seed: str) -> Any:
    import torch

    from qsched_core.evaluation.study import ArmStudy, Part

    arm, part = ArmStudy(folder), Part(0, kept.planted()["ramp"][0].scores, 0.125, 16)
    pictures = torch.rand(2, 256, 256, 3, generator=torch.manual_seed(0))
    arm.keep(part, {"tower": torch.ones(2, 500)}, pictures)
    return arm.load(0, 2, ["tower"]), hashlib.sha256(
        arm.pictures(part, range(2)).numpy()
    ).hexdigest()


def _weights(folder: Path, seed: str) -> Any:
    import torch

    from qsched_core.formats import get
    from qsched_core.formats.policy import Choice
    from qsched_core.rounding import RoundedWeights
    from qsched_core.rounding.layer import plain

    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    weights = RoundedWeights(
        {"q": plain(get("int8"), weight, None, "")}, {"q": Choice("int8", False)}
    )
    return RoundedWeights.load(weights.save(folder / "weights.safetensors")).digest


WRITERS: dict[str, Callable[[Path, str], Any]] = {
    "file": _file, "schedule": _schedule, "study": _study, "evaluation": _evaluation,
    "weights": _weights,
}  # fmt: skip


def problem_of(disk: Path, name: str, seed: str) -> str:
    """Write onto a disk with a random rest of room, then with enough: "", or what went wrong."""
    from qsched_core.evaluation import EvaluationError
    from qsched_core.files import DiskError
    from qsched_core.study import CalibrationError

    chance, write = random.Random(seed), WRITERS[name]
    with tempfile.TemporaryDirectory() as other:
        wanted = write(Path(other), seed)
        needed = sum(p.stat().st_size for p in Path(other).rglob("*"))
    folder, filler = disk / "work", disk / "filler"
    folder.mkdir()
    try:
        room = chance.choice((0, PAGE, needed // 2, needed, 2 * needed, 17 << 20, 34 << 20))
        room = int(room * chance.uniform(0.5, 1.5))
        free = os.statvfs(disk).f_bavail * PAGE
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            file.write(bytes(max(0, free - room)))
        try:
            first = write(folder, seed)
        except (DiskError, CalibrationError, EvaluationError) as error:
            first, text = None, str(error)
            if str(folder) not in text or "\n" in text:
                return f"the message does not name the place: {text[:300]}"
            if not any(word in text for word in ("full", "space", "room")):
                return f"the message does not say that the disk is full: {text[:300]}"
        except Exception as error:
            return f"undocumented {type(error).__name__}: {str(error)[:300]}"
        if first not in (None, wanted):
            return "what was written is not what was to be written"
        left = [path.name for path in folder.rglob("*") if ".partial" in path.name]
        if left:
            return f"left behind: {', '.join(left[:5])}"
        filler.unlink()
        if write(folder, seed) != wanted:
            return "with room again, the result is another one"
        return ""
    finally:
        subprocess.run(["rm", "-rf", str(folder), str(filler)], check=False)


def run(setting: Setting) -> Outcome:
    reason = why_not()
    if reason:
        return Outcome(0, [], "a full disk", skipped=reason)
    failures = []
    with small_disk() as disk:
        for index in range(setting.size):
            name = list(WRITERS)[index % len(WRITERS)]
            seed = f"{setting.seed}/{index}"
            problem = problem_of(disk, name, seed)
            if problem:
                failures.append(Failure(ATTACK, {"writer": name, "seed": seed}, problem))
    setting.tell(f"  {setting.size} full disks, {len(failures)} failures")
    note = f"disks of which a random rest is free: {', '.join(WRITERS)}"
    return Outcome(setting.size, failures, note)


def again(failure: Failure) -> str:
    with small_disk() as disk:
        return problem_of(disk, failure.case["writer"], failure.case["seed"])
