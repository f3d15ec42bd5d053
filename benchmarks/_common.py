"""What every benchmark shares: interleaved timing, rows, the machine's name, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qsched_core.files import write_atomic


@dataclass(frozen=True)
class BenchRow:
    """``ratio`` compares ``ours`` with ``other`` (medians of ``n`` runs, in ``unit``)."""

    id: str
    what: str
    ours: float
    other: float
    ratio: float
    unit: str
    n: int
    machine: str


def machine() -> str:
    """The processor (and GPU), as it names itself."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def medians(ours: Callable[[], object], other: Callable[[], object], n: int) -> tuple[float, float]:
    """Median seconds of both, run in turn so that drift of the machine hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(n + 1):
        for index, call in enumerate((ours, other)):
            started = time.perf_counter()
            call()
            if run:  # the first of each warms up
                times[index].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


def report(rows: list[BenchRow], path: Path | None) -> None:
    for row in rows:
        print(
            f"{row.id:28} ours {row.ours:.4g} {row.unit}, other {row.other:.4g} {row.unit}, "
            f"ratio {row.ratio:.3f} (n={row.n})  {row.what}"
        )
    if path is not None:
        write_atomic(path, json.dumps([asdict(row) for row in rows], indent=1))
