"""Many small prompts on one real server: its memory must not grow, and none may fail.

Memory is what the process holds itself.  Pages of a mapped checkpoint come and go by hundreds of MB as
models are opened and the system likes; they are the system's cache, and are told beside it.  Nor may
the number of maps grow.  ComfyUI's history of its last 10 000 prompts is its own, and is emptied every
few prompts.  glibc is told to give large blocks back at once: left alone it keeps freed
ones of up to 32 MB in its heap, which then grows in steps of their size with nothing held in them.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path

import psutil

from devtools.server import ServerError

from . import graphs
from .cases import Failure, Outcome, Setting

ATTACK = "soak"
WARM = 50  # prompts after which memory is looked at
FORMATS = ("nf4", "int8", "int2")
CYCLE = 10  # prompts; each cycle has the same kinds of work in another order
LIMIT = 1.0  # MB a hundred prompts
MOST_MAPS = 4  # more than after the first WARM prompts: what the last few have open


# Of malloc: blocks from this size on are maps of their own.
RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2",
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


def slope(memory: list[float]) -> float:
    """MB a hundred prompts: Theil and Sen's median over the cycles' medians, after ``WARM``."""
    kept = memory[min(WARM, len(memory) // 2) :]
    cycles = [statistics.median(kept[i : i + CYCLE]) for i in range(0, len(kept), CYCLE)]
    pairs = [
        (later - earlier) / (j - i)
        for i, earlier in enumerate(cycles)
        for j, later in enumerate(cycles[i + 1 :], i + 1)
    ]
    return statistics.median(pairs) * 100 / CYCLE if pairs else 0.0


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


def run(setting: Setting) -> Outcome:
    failures: list[Failure] = []
    memory: list[float] = []
    mapped: list[float] = []
    opened: list[int] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        graphs.models(Path(name))
        with graphs.server(Path(name), **RETURNED) as server:
            process = psutil.Process(server.process.pid)
            for index in range(setting.size):
                prompt = prompt_of(index, setting.seed)
                try:
                    server.run(prompt)
                except (ServerError, OSError) as error:
                    case = {"prompt": prompt, "index": index, "seed": setting.seed}
                    failures.append(Failure(ATTACK, case, str(error)[:1000]))
                    if server.process.poll() is not None:
                        break
                own, files = held(process)
                memory.append(own)
                mapped.append(files)
                if index % CYCLE == CYCLE - 1:
                    server.request("/history", {"clear": True})
                if index % WARM == WARM - 1:
                    opened.append(maps(process))
                    setting.tell(
                        f"  {index + 1} prompts, {own:.1f} MB, {files:.0f} MB of {opened[-1]} maps"
                    )
    found, first = slope(memory), min(WARM, len(memory) // 2)
    note = (
        f"{len(memory)} prompts, {len(failures)} errors; memory {memory[first]:.1f} MB after the first "
        f"{first}, {memory[-1]:.1f} MB at the end; mapped files {min(mapped):.0f} to {max(mapped):.0f} MB"
    )
    if opened and opened[-1] > opened[0] + MOST_MAPS:
        case = {"seed": setting.seed, "size": len(memory), "maps": opened}
        failures.append(Failure(ATTACK, case, f"models stay mapped: {opened} every {WARM} prompts"))
    if found > LIMIT and len(memory) >= 3 * WARM:
        case = {"seed": setting.seed, "size": len(memory), "memory": [round(m, 1) for m in memory]}
        failures.append(Failure(ATTACK, case, f"memory grows by {found:.2f} MB a hundred prompts"))
    return Outcome(len(memory), failures, note, found, LIMIT, "MB per 100 prompts")


def again(failure: Failure) -> str:
    """The failure's prompt alone on a fresh server, or the whole run where memory grew."""
    if "prompt" not in failure.case:
        with tempfile.TemporaryDirectory() as name:
            found = run(Setting(failure.case["size"], failure.case["seed"], Path(name)))
        return found.failures[-1].problem if found.failures else ""
    with tempfile.TemporaryDirectory() as name:
        graphs.models(Path(name))
        with graphs.server(Path(name)) as server:
            try:
                server.run(failure.case["prompt"])
            except ServerError as error:
                return str(error)
    return ""
