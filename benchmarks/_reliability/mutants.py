"""Damaged inputs of every kind, each read in a process of its own beside this one.

A worker goes through the mutants of one kind.  It says in shared memory at which it is, so that one
that dies or hangs there is found, named, and gone past.  Mutant number i of a kind is made from seed,
kind and i alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import mmap
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from . import hosted, kept, kinds
from .cases import Failure, Outcome, Setting

ATTACK = "mutants"
ROOT = Path(__file__).resolve().parents[2]
KINDS = kinds.KINDS | kept.KINDS | hosted.KINDS
# Of all mutants; together 1.  What takes long to read gets few.
SHARES = {
    "header": 0.2, "entry": 0.14, "schedule": 0.2, "prompts": 0.13, "layers": 0.13, "formula": 0.1,
    "study": 0.02, "shared": 0.002, "evaluation": 0.02, "features": 0.01, "rounding": 0.01,
    "scorer": 0.008, "picture": 0.01, "model": 0.01, "loading": 0.004, "early": 0.006,
}  # fmt: skip
CPU_SECONDS = 2.0  # that one mutant may take; a busy machine's clock counts for nothing
STUCK_CPU_SECONDS = 60.0  # of a worker without a step forward; importing takes a third of it
STUCK_SECONDS = 600.0  # the same by the clock, for one that waits
MOST_A_KIND = 20  # failures after which a kind is left
MOST_BYTES = 2**22  # of a mutant
SLOT = struct.Struct("<QQQ")  # number, sample, and bytes of the mutant at hand, which follow


def mutant_of(kind: kinds.Kind, seed: int, index: int) -> tuple[bytes, int]:
    """Mutant number ``index``, and which sample it was."""
    chance = random.Random(f"{seed}/{kind.name}/{index}")
    sample = chance.randrange(len(kind.samples))
    return kind.mutant(kind.samples[sample], chance), sample


def problem_of(kind: kinds.Kind, data: bytes, sample: int) -> tuple[str, bool]:
    """("", whether it was read), or what is wrong with how it went."""
    began = time.process_time()
    try:
        found = kind.read(data, sample)
    except kinds.DifferentError as error:
        return f"silent other value: {error}", False
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        said = " ".join(str(error).split())[:300]
        return f"undocumented {type(error).__name__} at {where}: {said}", False
    spent = time.process_time() - began
    return (f"took {spent:.1f} s of CPU" if spent > CPU_SECONDS else ""), found


def work(name: str, seed: int, start: int, stop: int, folder: Path) -> None:
    """The worker: a line of JSON for each failure, and one at the end."""
    logging.disable(logging.CRITICAL)
    with open(folder / "slot", "r+b") as file:
        slot = mmap.mmap(file.fileno(), SLOT.size + MOST_BYTES)
    kind, found = KINDS[name](folder), 0
    for sample, data in enumerate(kind.samples):  # sound ones, which import what reading takes
        kind.read(data, sample)
    for index in range(start, stop):
        data, sample = mutant_of(kind, seed, index)
        slot[: SLOT.size] = SLOT.pack(index, sample, len(data))
        slot[SLOT.size : SLOT.size + len(data)] = data
        problem, ok = problem_of(kind, data, sample)
        found += ok
        if problem:
            put = base64.b64encode(data).decode()
            line = {"index": index, "sample": sample, "problem": problem, "data": put}
            print(json.dumps(line), flush=True)
    print(json.dumps({"read": found}), flush=True)


def again(failure: Failure) -> str:
    """What is wrong with the failure's mutant now; "" if it is mended."""
    name = failure.case["kind"]
    with tempfile.TemporaryDirectory() as folder:
        return problem_of(KINDS[name](Path(folder)), failure.data, failure.case["sample"])[0]


def run(setting: Setting, names: Sequence[str] = tuple(KINDS)) -> Outcome:
    failures: list[Failure] = []
    counts: dict[str, int] = {}
    for name in names:
        size = max(20, round(setting.size * SHARES[name]))
        with tempfile.TemporaryDirectory(dir=setting.work) as folder:
            counts[name], read, found = _of_kind(name, setting.seed, size, Path(folder))
        failures += found
        setting.tell(f"  {name}: {counts[name]} mutants, {read} read, {len(found)} failures")
    note = ", ".join(f"{name} {tried}" for name, tried in counts.items())
    return Outcome(sum(counts.values()), failures, f"damaged inputs: {note}")


def _of_kind(name: str, seed: int, size: int, folder: Path) -> tuple[int, int, list[Failure]]:
    """How many were tried, how many could be read, and the failures.

    A worker that ended early is followed by another, behind the mutant that it ended at.
    """
    start, read, failures = 0, 0, []

    def failed(index: int, sample: int, problem: str, data: bytes) -> None:
        case = {"kind": name, "seed": seed, "index": index, "sample": sample}
        failures.append(Failure(ATTACK, case, problem, data))

    slot = folder / "slot"
    with open(slot, "wb") as file:
        file.truncate(SLOT.size + MOST_BYTES)
    while start < size and len(failures) < MOST_A_KIND:
        lines, ending = _worker(name, seed, start, size, folder)
        for line in lines:
            if "problem" in line:
                data = base64.b64decode(line["data"])
                failed(line["index"], line["sample"], line["problem"], data)
            else:
                read += line["read"]
        if not ending:
            return size, read, failures
        with open(slot, "rb") as file:
            index, sample, length = SLOT.unpack(file.read(SLOT.size))
            failed(index, sample, ending, file.read(length))
        start = index + 1
    return start, read, failures


def _worker(name: str, seed: int, start: int, stop: int, folder: Path) -> tuple[list[dict], str]:
    """What a worker said, and how it ended ("" as it should)."""
    command = [sys.executable, "-m", __name__, name, str(seed), str(start), str(stop), str(folder)]
    ending = ""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=told)
        try:
            before, since, cpu = b"", time.monotonic(), 0.0
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                with open(folder / "slot", "rb") as file:
                    now = file.read(SLOT.size)
                clock, spent = time.monotonic(), _cpu_seconds(process.pid)
                if now != before:
                    before, since, cpu = now, clock, spent
                elif spent - cpu > STUCK_CPU_SECONDS or clock - since > STUCK_SECONDS:
                    ending = f"no end within {clock - since:.0f} s, {spent - cpu:.0f} of them CPU"
                    break
        finally:
            process.kill()
            process.wait()
        said.seek(0), told.seek(0)
        lines = [json.loads(line) for line in said.read().splitlines() if line.startswith(b"{")]
        errors = told.read().decode(errors="replace").strip()
    if not ending and not any("read" in line for line in lines):
        ending = f"the process died ({process.returncode}): {errors[-300:]}"
    return lines, ending


def _cpu_seconds(process_id: int) -> float:
    try:
        times = psutil.Process(process_id).cpu_times()
    except psutil.Error:  # it ended meanwhile
        return 0.0
    return times.user + times.system


if __name__ == "__main__":
    work(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
