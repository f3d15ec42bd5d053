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
    """``ratio`` compares ``ours`` with ``other`` (medians of ``n`` runs, in ``unit``).

    ``bound`` is what the ratio has to reach, as ">= 3.75" or "<= 0.45", "" if nothing is promised.
    ``skipped`` says why the row could not be measured here: its numbers are None then.
    """

    id: str
    what: str
    ours: float | None
    other: float | None
    ratio: float | None
    unit: str
    n: int
    machine: str
    bound: str = ""
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the bound; None without either."""
        if not self.bound or self.ratio is None:
            return None
        sign, limit = self.bound.split()
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)


def machine() -> str:
    """The processor (and GPU), as it names itself."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def timings(
    ours: Callable[[], object], other: Callable[[], object], n: int
) -> tuple[list[float], list[float]]:
    """Seconds of ``n`` runs of both, in turn and each first as often as the other.

    Drift of the machine hits both alike: run k of one is the neighbour of run k of the other.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(n + 1):
        pair = ((0, ours), (1, other))
        for index, call in pair if run % 2 else reversed(pair):
            started = time.perf_counter()
            call()
            if run:  # the first of each warms up
                times[index].append(time.perf_counter() - started)
    return times


def medians(ours: Callable[[], object], other: Callable[[], object], n: int) -> tuple[float, float]:
    """Median seconds of both over :func:`timings`."""
    first, second = timings(ours, other, n)
    return statistics.median(first), statistics.median(second)


def options(
    description: str | None, runs: int = 15, groups: tuple[str, ...] = ()
) -> argparse.Namespace:
    """What the command line says; ``only`` names those of ``groups`` that are wanted."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--runs", type=int, default=runs)
    if groups:
        parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    return parser.parse_args()


def report(rows: list[BenchRow], path: Path | None) -> None:
    for row in rows:
        if row.skipped:
            print(f"{row.id:28} skipped: {row.skipped}  {row.what}")
            continue
        verdict = {None: "", True: f", {row.bound} met", False: f", {row.bound} MISSED"}[row.met]
        print(
            f"{row.id:28} ours {row.ours:.4g} {row.unit}, other {row.other:.4g} {row.unit}, "
            f"ratio {row.ratio:.3f}{verdict} (n={row.n})  {row.what}"
        )
    if path is not None:
        plain = [asdict(row) | {"met": row.met} for row in rows]
        write_atomic(path, json.dumps(plain, indent=1))
