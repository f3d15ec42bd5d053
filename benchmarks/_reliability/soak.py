"""Many small prompts on one real server: its memory must not grow, and none may fail.

Memory is what the process has allocated (allocated.py) after the same prompt at the end of each cycle.
Python allocates by malloc here, so that its objects count with the tensors.  Resident memory is told
beside it, without mapped files: pages of a mapped checkpoint come and go as the system likes.  Where
malloc can't be asked, resident memory is the measure.  Nor may the number of mapped files grow.

ComfyUI's history of its last 10 000 prompts is its own, and is emptied after each cycle.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from devtools.server import ComfyServer, ServerError

from . import allocated, graphs
from .cases import Failure, Outcome, Setting

ATTACK = "soak"
WARM = 50  # prompts after which memory is looked at
FORMATS = ("nf4", "int8", "int2")
CYCLE = 10  # prompts; each cycle has the same kinds of work in another order
LIMIT = 1.0  # MB a hundred prompts
MOST_MAPS = 4  # more than after the first WARM prompts: what the last few have open


# Python's own allocator would hide its objects from malloc; blocks above the threshold go back at once.
ALLOCATOR = {
    "PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "2",
}  # fmt: skip


def prompt_of(index: int, seed: int) -> dict:
    """Prompt ``index``: sampling, each format in turn, with an evaluation, a search and text between."""
    cycle, at = divmod(index, CYCLE)
    order = list(range(CYCLE))
    random.Random(f"{seed}/{cycle}").shuffle(order)
    kind, form = order[at], FORMATS[cycle % len(FORMATS)]
    if kind == 0:
        return graphs.evaluating(form, index)
    if kind == 1 and cycle % 3 == 0:
        return graphs.calibrating(form, index)
    return graphs.sampling(form, seed * 100_000 + index, save=kind == 2)


def slope(memory: Sequence[float], step: int = CYCLE) -> float:
    """MB a hundred prompts, of a look every ``step`` prompts: Theil and Sen's median, after ``WARM``."""
    kept = memory[min(WARM // step, len(memory) // 2) :]
    pairs = [
        (later - earlier) / (j - i)
        for i, earlier in enumerate(kept)
        for j, later in enumerate(kept[i + 1 :], i + 1)
    ]
    return statistics.median(pairs) * 100 / step if pairs else 0.0


def held(process: psutil.Process) -> tuple[float, float]:
    """MB that the process holds itself, and of files that are mapped into it (0: not told here)."""
    found = process.memory_info()
    mapped = getattr(found, "shared", 0)  # Linux alone
    return (found.rss - mapped) / 1e6, mapped / 1e6


def maps(process: psutil.Process) -> int:
    """How many model files are mapped, each as often as it is; 0 where the system does not tell."""
    try:
        found = process.memory_maps(grouped=False)
    except (AttributeError, psutil.Error):
        return 0
    return sum(entry.path.endswith(".safetensors") for entry in found)


@dataclass
class Seen:
    """What is looked at: at the end of every cycle in MB, at every ``WARM`` prompts the number of maps."""

    used: list[float] = field(default_factory=list)
    heap: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    def look(self, server: ComfyServer, process: psutil.Process) -> None:
        own, files = held(process)
        told = server.get(allocated.ROUTE) or {"used": own, "heap": 0.0}
        self.used.append(told["used"])
        self.heap.append(told["heap"])
        self.resident.append(own)
        self.files.append(files)

    def note(self) -> str:
        first = min(WARM // CYCLE, len(self.used) // 2)
        return (
            f"allocated {self.used[first]:.1f} MB after the first {first * CYCLE}, "
            f"{self.used[-1]:.1f} MB at the end; resident {self.resident[first]:.0f} and "
            f"{self.resident[-1]:.0f} MB ({slope(self.resident):+.2f} per 100 prompts) with a heap of "
            f"{self.heap[first]:.1f} and {self.heap[-1]:.1f} MB; mapped files {min(self.files):.0f} to "
            f"{max(self.files):.0f} MB"
        )


def _install(base: Path) -> None:
    """Put the node that tells what is allocated into a server's folder."""
    target = base / "custom_nodes" / "qsched_bench_allocated.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(allocated.__file__, target)


def _problem(server: ComfyServer, prompt: dict) -> str:
    try:
        server.run(prompt)
    except (ServerError, OSError) as error:
        return str(error)[:1000] or type(error).__name__
    return ""


def run(setting: Setting) -> Outcome:
    failures: list[Failure] = []
    seen, count = Seen(), 0
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        graphs.models(Path(name))
        _install(Path(name))
        with graphs.server(Path(name), **ALLOCATOR) as server:
            process = psutil.Process(server.process.pid)
            for index in range(setting.size):
                ends = index % CYCLE == CYCLE - 1 or index == setting.size - 1
                prompts = [prompt_of(index, setting.seed)]
                if ends:  # the same each time: what is loaded then is the same
                    prompts.append(graphs.sampling("int8", setting.seed * 100_000 + index))
                count += 1
                for prompt in prompts:
                    if problem := _problem(server, prompt):
                        case = {"prompt": prompt, "index": index, "seed": setting.seed}
                        failures.append(Failure(ATTACK, case, problem))
                if server.process.poll() is not None:
                    break
                if ends:
                    server.request("/history", {"clear": True})
                    seen.look(server, process)
                if index % WARM == WARM - 1:
                    seen.opened.append(maps(process))
                    setting.tell(
                        f"  {count} prompts, {seen.used[-1]:.2f} MB, {seen.resident[-1]:.1f} MB resident, "
                        f"{seen.files[-1]:.0f} MB of {seen.opened[-1]} maps"
                    )
    found, note = slope(seen.used), f"{count} prompts, {len(failures)} errors"
    if seen.used:
        note += f"; {seen.note()}"
    case = {"seed": setting.seed, "size": count}
    opened = seen.opened
    if opened and opened[-1] > opened[0] + MOST_MAPS:
        problem = f"models stay mapped: {opened} every {WARM} prompts"
        failures.append(Failure(ATTACK, case | {"maps": opened}, problem))
    if found > LIMIT and count >= 3 * WARM:
        used = [round(m, 2) for m in seen.used]
        problem = f"memory grows by {found:.2f} MB a hundred prompts"
        failures.append(Failure(ATTACK, case | {"memory": used}, problem))
    return Outcome(count, failures, note, found, LIMIT, "MB per 100 prompts")


def again(failure: Failure) -> str:
    """The failure's prompt alone on a fresh server, or the whole run where memory grew."""
    if "prompt" not in failure.case:
        with tempfile.TemporaryDirectory() as name:
            found = run(Setting(failure.case["size"], failure.case["seed"], Path(name)))
        return found.failures[-1].problem if found.failures else ""
    with tempfile.TemporaryDirectory() as name:
        graphs.models(Path(name))
        with graphs.server(Path(name)) as server:
            return _problem(server, failure.case["prompt"])
