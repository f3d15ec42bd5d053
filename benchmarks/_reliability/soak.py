"""Many small prompts on one real server: its memory must not grow, and none may fail."""

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


def run(setting: Setting) -> Outcome:
    failures: list[Failure] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        graphs.models(Path(name))
        with graphs.server(Path(name)) as server:
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
                memory.append(process.memory_info().rss / 1e6)
                if index % 50 == 49:
                    setting.tell(f"  {index + 1} prompts, {memory[-1]:.0f} MB")
    found = slope(memory)
    note = (
        f"{len(memory)} prompts, {len(failures)} errors; resident memory "
        f"{memory[min(WARM, len(memory) // 2)]:.0f} MB after the first {min(WARM, len(memory) // 2)}, "
        f"{memory[-1]:.0f} MB at the end"
    )
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
