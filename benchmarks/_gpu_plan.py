"""What a row of the GPU benchmark is, what it has at hand, and how long and large it is."""

from __future__ import annotations

import gc
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qsched_core.formats import WeightFormat, get
from qsched_core.formats.kitchen import KitchenFormat

WARM, ENOUGH = 2, 0.02  # calls before timing; seconds that one timing takes at least


class SkipRow(Exception):  # noqa: N818  it is no error
    """Why a row can't be measured here."""


@dataclass(frozen=True)
class Measured:
    """``ratio`` compares ``ours`` with ``other``, in ``unit``; ``n`` timings of each; ``detail`` is plain data."""

    ours: float | None
    other: float | None
    ratio: float | None
    unit: str
    n: int = 1
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the plan; its id is stable.  ``gb``, ``host_gb`` and ``seconds`` are estimates.

    With less than ``gb`` of free device memory a row can't run; some use more where there is more.
    ``host_gb`` is pinned memory of the host.  ``needs`` are packages; ``format`` is asked whether it
    can run on the device.
    """

    id: str
    what: str
    gb: float
    seconds: float
    run: Callable[[Bench], Measured]
    needs: tuple[str, ...] = ()
    format: str = ""
    host_gb: float = 0.0

    def too_large(self, free: float, host: float | None) -> str:
        """Why it does not run with so many bytes free on device and host (None: unknown); "" if it does."""
        if self.gb * 1e9 > free:
            return f"needs {self.gb:.1f} GB; {free / 1e9:.1f} GB are free"
        if host is not None and self.host_gb * 1e9 > host:
            return f"needs {self.host_gb:.1f} GB of the host's memory; {host / 1e9:.1f} GB are free"
        return ""


def host_memory() -> float | None:
    """Bytes of the host that are free; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024.0 * int(re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)[1])
    except (OSError, TypeError):
        return None


class Bench:
    """The device and what rows share."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny
        self.dtype = torch.bfloat16
        self.kept: dict[Any, Any] = {}
        self.runs = 2 if tiny else 5

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def memory(self) -> int:
        """Bytes of the device that are free at the start."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 4 << 30

    def check(self, row: Row) -> None:
        """SkipRow if the row lacks a package, memory, or a device for its format."""
        needs = [*row.needs]
        if row.format and isinstance(get(row.format), KitchenFormat):
            needs.append("comfy_kitchen")
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            raise SkipRow(f"needs {', '.join(missing)}, not installed here")
        if row.format:
            self.format(row.format)
        reason = "" if self.tiny or not self.cuda else row.too_large(self.memory, host_memory())
        if reason:
            raise SkipRow(reason)

    def format(self, name: str) -> WeightFormat:
        form = get(name)
        reason = form.available(self.device)
        if reason is not None:
            raise SkipRow(reason)
        return form

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """GB of the device at most since ``clear``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None

    def seconds(self, *calls: Callable[[], object]) -> list[float]:
        """Median seconds of one run of each, in turn, so that a device's drift hits all alike."""
        counts = []
        for call in calls:
            for _ in range(WARM):
                call()
            self.sync()
            started = time.perf_counter()
            call()
            self.sync()
            once = max(1e-7, time.perf_counter() - started)
            counts.append(1 if self.tiny else min(1000, max(1, int(ENOUGH / once))))
        found: list[list[float]] = [[] for _ in calls]
        for run in range(self.runs):
            order = list(range(len(calls)))
            for index in order if run % 2 else reversed(order):
                self.sync()
                started = time.perf_counter()
                for _ in range(counts[index]):
                    calls[index]()
                self.sync()
                found[index].append((time.perf_counter() - started) / counts[index])
        return [statistics.median(times) for times in found]

    def random(self, *shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)
