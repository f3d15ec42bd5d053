"""Work that is killed at a random moment, and begun again: what was finished stays, nothing else does.

Each job is a command of this project on a small model, or saving quantized models.  A kill waits until a
random number of units (trials, blocks, parts, files) is there, and a random part of a unit longer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .cases import Failure, Outcome, Setting

ATTACK = "kills"
ROOT = Path(__file__).resolve().parents[2]
TOO_LATE = 6  # a job that was done before its kill is begun anew as often
# Not the result: what it took.  A run that was begun anew evaluates the shared first steps once more.
CHANGING = ("seconds", "nfe", "new_images", "new_trials", "created", "resumed")
LEFT = (".partial", ".tmp")  # endings and beginnings of what a writer leaves
TASKS = ROOT / "tests" / "core"  # small models in plain torch
BLOCKS = 3  # of the small model whose weights are calibrated
SCORER = ("--scorer", str(ROOT / "demo" / "weights" / "scorer.safetensors"))


class JobError(Exception):
    """A job that was not killed and did not come to its end."""


@dataclass(frozen=True)
class Job:
    """``command(folder)`` are the arguments of the command ``name`` (see jobs.py) for its work in
    ``folder``; ``done`` counts the units that are kept there, ``told`` (a regular expression) finds
    those that it says are finished.  ``result`` is what comes of it."""

    name: str
    share: int
    command: Callable[[Path], Sequence[str]]
    done: Callable[[Path], int]
    told: str
    result: Callable[[Path], Any]


def _command(count: int, *more: str) -> Callable[[Path], list[str]]:
    """A command with ``count`` prompts to work with and 40 to judge by."""
    lists = {
        "calibration": [f"a picture of number {number}" for number in range(count)],
        "heldout": [f"another one, number {number}" for number in range(40)],
    }

    def command(folder: Path) -> list[str]:
        prompts = folder.parent / "prompts.json"
        prompts.write_text(json.dumps(lists), encoding="utf-8")
        own = (part.format(folder=folder) for part in more)
        return ["--folder", str(folder / "kept"), "--prompts", str(prompts), *own]

    return command


def _trials(folder: Path) -> int:
    """Finished trials of the search itself: those of the guard are not told one by one."""
    count, names = 0, []
    for path in list((folder / "kept").glob("*.journal")):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue
            content = json.loads(line)
            if content["op_code"] == 0:
                names.append(content["study_name"])
            elif b'"scores"' in line:
                count += ":heldout" not in names[content["study_id"]]
    return count


def _files(pattern: str) -> Callable[[Path], int]:
    """Counts files by name, while others come and go."""
    return lambda folder: sum(
        fnmatch(name, pattern) for *_, files in os.walk(folder / "kept") for name in files
    )


def _blocks(folder: Path) -> int:
    """Finished blocks; when all are, one file of all weights takes their place."""
    (kept,) = list((folder / "kept").glob("rounding-*")) or [folder]
    if (kept / "weights.safetensors").exists():
        return BLOCKS
    return len(list((kept / "blocks").glob("[!.]*.safetensors")))


def _plain_json(path: Path) -> Any:
    return _without(json.loads(path.read_text(encoding="utf-8")))


def _without(content: Any) -> Any:
    """What two runs have in common: all but how long it took and what was there already."""
    if isinstance(content, dict):
        return {k: _without(v) for k, v in content.items() if k not in CHANGING}
    return [_without(v) for v in content] if isinstance(content, list) else content


def _weights(folder: Path) -> Any:
    from qsched_core.rounding import RoundedWeights

    found = RoundedWeights.load(folder / "weights.safetensors")
    if not found.provenance["calibrated"]:
        raise JobError("the calibrated weights are no better than plain ones: nothing to compare")
    return found.digest, _without(dict(found.provenance))


def _models(folder: Path) -> list[Any]:
    """Headers and data of every saved model; the library orders a header's metadata by chance."""
    found = []
    for path in sorted((folder / "kept").iterdir()):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        found.append((path.name, json.loads(raw[8:start]), hashlib.sha256(raw[start:]).hexdigest()))
    return found


JOBS = (
    Job(
        "calibrate", 10,
        _command(
            4, "--task", f"{TASKS}/plain_task.py:quantized", *SCORER, "--search", "gp", "--budget",
            "8", "--out", "{folder}/schedule.json",
        ),
        _trials, r"^trial \d+ of", lambda folder: _plain_json(folder / "schedule.json"),
    ),
    Job(
        "calibrate_weights", 10,
        _command(
            32, "--task", f"{TASKS}/rounding_task.py:full", "--format", "int2", "--out",
            "{folder}/weights.safetensors",
        ),
        _blocks, r"^block \d+ of",
        _weights,
    ),
    Job(
        "evaluate", 8,
        _command(
            4, "--task", f"{TASKS}/plain_task.py:quantized", "--reference-task",
            f"{TASKS}/plain_task.py:full", *SCORER, "--json", "{folder}/report.json", "--csv", "{folder}/images.csv",
        ),
        _files("part-*.safetensors"), r"\d+ of \d+ images$",
        lambda folder: (_plain_json(folder / "report.json"), (folder / "images.csv").read_text()),
    ),
    Job(
        "save", 14, lambda folder: [str(folder / "kept")],
        _files("model_*.safetensors"), r"^saved ", _models,
    ),
)  # fmt: skip


def _context():
    """Processes that begin with everything imported, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks._reliability.jobs"])
    return context


def _begin(job: Job, folder: Path):
    (folder / "kept").mkdir(parents=True, exist_ok=True)
    os.environ["PLAIN_TASK_SLEEP"] = "0.03"  # or its units are done before they can be killed
    arguments = (job.name, list(job.command(folder)), str(folder.parent))
    process = _context().Process(target=work, args=(*arguments, str(folder) + ".said"))
    process.start()
    return process


def work(name: str, arguments: list[str], folder: str, said: str) -> None:
    """In the job's own process: what it says goes to the file ``said``."""
    from . import jobs

    place = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(place, 1), os.dup2(place, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    logging.disable(logging.INFO)
    sys.exit(jobs.run(name, arguments, Path(folder)))


def _told(job: Job, folder: Path) -> list[str]:
    path = Path(f"{folder}.said")
    if not path.exists():  # it was killed before it said anything
        return []
    said = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in said.splitlines() if re.search(job.told, line)]


def _run(job: Job, folder: Path) -> list[str]:
    """The units that the whole job told of; JobError with its last words."""
    _ended(_begin(job, folder), folder)
    return _told(job, folder)


def _ended(process, folder: Path) -> None:
    process.join()
    if process.exitcode:
        said = Path(f"{folder}.said").read_text(encoding="utf-8", errors="replace")
        raise JobError(f"exit code {process.exitcode}: {said.strip()[-500:]}")


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run: its result, units, files, and seconds a unit."""

    result: Any
    units: int
    names: set[str]
    seconds: float


def whole_of(job: Job, folder: Path) -> Whole:
    process = _begin(job, folder)
    while process.is_alive() and not job.done(folder):
        time.sleep(0.005)
    began = time.monotonic()
    _ended(process, folder)
    units = job.done(folder)
    return Whole(job.result(folder), units, _names(folder), (time.monotonic() - began) / units)


def killed(job: Job, folder: Path, units: int, seconds: float) -> list[str] | None:
    """What the job told until it was killed, ``seconds`` after ``units`` were there; None if it ended."""
    process = _begin(job, folder)
    while process.is_alive() and job.done(folder) < units:
        time.sleep(0.005)
    process.join(seconds)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    return None if ended else _told(job, folder)


def problem_of(job: Job, whole: Whole, folder: Path, seed: str) -> str:
    """Kill the job once at a random moment and go on: "", or what was lost, other or left behind.

    A save that is killed is no unit: the file that was begun is made anew.
    """
    chance = random.Random(seed)
    for attempt in range(TOO_LATE):
        place = folder / str(attempt)
        units = chance.randrange(whole.units)
        before = killed(job, place, units, chance.uniform(0, whole.seconds))
        if before is not None:
            break
    else:
        return f"the job was done before every one of {TOO_LATE} kills"
    kept = job.done(place)
    if len(before) > kept:
        return f"{len(before)} units were said to be finished, {kept} are there"
    try:
        made = len(_run(job, place))
    except JobError as error:
        return f"it does not go on: {error}"
    if made != whole.units - kept:
        return f"{kept} of {whole.units} units were there, and {made} were made after it"
    left = {name for name in _names(place) if _is_left(name)} | (_names(place) - whole.names)
    if left:
        return f"left behind: {', '.join(sorted(left)[:5])}"
    if job.result(place) != whole.result:
        return "the result differs from the uninterrupted run's"
    return ""


def _is_left(name: str) -> bool:
    last = Path(name).name
    return last.endswith(LEFT[0]) or last.startswith(LEFT[1])


def again(failure: Failure) -> str:
    (job,) = (job for job in JOBS if job.name == failure.case["job"])
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_of(job, Path(folder) / "whole")
        return problem_of(job, whole, Path(folder) / "again", failure.case["seed"])


def run(setting: Setting) -> Outcome:
    failures: list[Failure] = []
    counts: dict[str, int] = {}
    every = sum(job.share for job in JOBS)
    for job in JOBS:
        count = counts[job.name] = max(1, round(setting.size * job.share / every))
        with tempfile.TemporaryDirectory(dir=setting.work) as name:
            whole = whole_of(job, Path(name) / "whole")
            for index in range(count):
                seed = f"{setting.seed}/{job.name}/{index}"
                problem = problem_of(job, whole, Path(name) / f"k{index}", seed)
                if problem:
                    setting.tell(f"  {job.name}: {problem}")
                    failures.append(Failure(ATTACK, {"job": job.name, "seed": seed}, problem))
        setting.tell(f"  {job.name}: {count} kills, {whole.units} units, {len(failures)} failures")
    note = ", ".join(f"{name} {count}" for name, count in counts.items())
    return Outcome(sum(counts.values()), failures, f"kills at random moments: {note}")
