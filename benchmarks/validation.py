"""How long any text can hold up the server: every node's validation against hostile inputs.

ComfyUI validates a workflow on the thread that serves every page, before it is queued.  Each input
of each node gets texts and numbers made to be slow, alone and in all inputs of the node at once;
a row is a node, with the CPU-seconds of its slowest case (the best of several runs) and what that case
was, with the seconds of the clock beside it: on a busy machine these are its neighbours' too.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

from . import _hostile
from ._common import BenchRow, machine, options, report
from ._families import FLUX_SCHNELL, weights
from ._host import PACK, import_pack

BOUND = 0.05  # seconds
MANY_OPTIONS = 8
NUMBERS = (float("inf"), float("-inf"), float("nan"), 1e308, -1, 0, 10**400, 10**5000, True)


def nodes() -> list[type]:
    """Every node of the pack that validates its inputs itself."""
    import_pack()
    folder = Path(__file__).resolve().parents[1] / "nodes"
    modules = [
        importlib.import_module(f"{PACK}.nodes.{path.stem}")
        for path in sorted(folder.glob("[!_]*.py"))
    ]
    found = [node for module in modules for node in getattr(module, "NODES", ())]
    return [node for node in found if "validate_inputs" in vars(node)]


def prepare(folder: Path) -> str:
    """Files for nodes that read schedules; the name of a model's last layer."""
    host = importlib.import_module(f"{PACK}.nodes.host.folders")
    paths = importlib.import_module("folder_paths")
    host.register_folders()
    (folder / "qsched").mkdir()
    paths.add_model_folder_path("qsched", str(folder / "qsched"), is_default=True)
    for index, (_, text) in enumerate(_hostile.schedules()):
        path = folder / "qsched" / f"{index}.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return [weight.layer for weight in weights(FLUX_SCHNELL.module()) if weight.kind][-1]


def cases(node: type, folder: Path, last: str) -> Iterator[tuple[str, dict]]:
    """(what is done, the inputs) for one node."""
    asked = set(inspect.signature(node.validate_inputs).parameters)
    inputs = {i.id: i for i in node.define_schema().inputs if i.id in asked}
    choices = {name: list(i.options) for name, i in inputs.items() if hasattr(i, "options")}
    base = {
        name: (choices.get(name) or [""])[0] if getattr(i, "default", None) is None else i.default
        for name, i in inputs.items()
    }
    bases = [base] + [
        base | {name: option}
        for name, few in choices.items()
        if len(few) <= MANY_OPTIONS
        for option in few
    ]
    of_texts = [name for name, value in base.items() if isinstance(value, str)]
    for start in bases:
        for label, text in chain(_hostile.texts(), _hostile.texts(_hostile.LARGE)):
            for name in of_texts:
                yield f"{name}: {label}", start | {name: text}
            free = [name for name in of_texts if name not in choices]
            yield f"all: {label}", start | dict.fromkeys(free, text)
        for name in set(base) - set(of_texts):
            for number in NUMBERS:
                with suppress(OverflowError, ValueError):  # which ComfyUI refuses itself
                    yield f"{name}: a number", start | {name: type(base[name])(number)}
    yield from _own_cases(base, folder, last)


def _own_cases(base: dict, folder: Path, last: str) -> Iterator[tuple[str, dict]]:
    """What is hostile to one kind of input."""
    if "layers" in base:
        for label, text in _hostile.layer_overrides(last):
            yield f"layers: {label}", base | {"layers": text}
    if "text" in base:
        for label, text in _hostile.schedules():
            yield f"text: {label}", base | {"text": text}
    if "schedule_name" in base:
        for path in (folder / "qsched").iterdir():
            yield f"schedule_name: {path.name}", base | {"schedule_name": path.name}


def slowest(node: type, folder: Path, last: str, runs: int) -> BenchRow:
    """The row of ``node``; RuntimeError for a case that raises instead of giving its reason."""
    worst, clock, what, count = 0.0, 0.0, "", 0
    for label, inputs in cases(node, folder, last):
        call = partial(node.validate_inputs, **inputs)
        try:
            seconds, passed = _seconds(call, runs, worst)
        except Exception as error:
            raise RuntimeError(
                f"{node.define_schema().node_id}, {label}: {type(error).__name__}: {error}"[:300]
            ) from error
        count += 1
        if seconds > worst:
            worst, clock, what = seconds, passed, label
    name = node.define_schema().node_id
    what = f"the slowest of {count} hostile inputs: {what} ({clock:.4f} s by the clock)"
    return BenchRow(
        f"validation.{name}", what, worst, BOUND, worst / BOUND, "CPU-s", runs, machine(), "<= 1"
    )


def _seconds(call, runs: int, enough: float) -> tuple[float, float]:
    """The fewest CPU-seconds of ``runs``, or of those until one takes no more than ``enough``.

    And the fewest seconds of the clock."""
    best = clock = float("inf")
    for _ in range(runs):
        gc.collect(0)
        started, cpu = time.perf_counter(), time.process_time()
        call()
        best = min(best, time.process_time() - cpu)
        clock = min(clock, time.perf_counter() - started)
        if best <= enough:
            break
    return best, clock


def main() -> None:
    chosen = options(__doc__, runs=5)
    found = nodes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        last = prepare(folder)
        rows = [slowest(node, folder, last, chosen.runs) for node in found]
    report(rows, chosen.json)


if __name__ == "__main__":
    main()
