"""Calibrated rounding at the sizes of FLUX.1: memory of one block, the host's, and a layer's time.

Weights and inputs are random; every measurement is in a process of its own.

``calibrate.peak``: a walk through blocks with FLUX's shapes (linear1 21504 x 3072, linear2 3072 x
15360, img_mlp 12288 x 3072 and 3072 x 12288, qkv 9216 x 3072, bf16), what the device holds at most
beyond the weights, against 6 GB.  On a GPU all of it; on a CPU, where that would take an hour, linear2
alone, the layer that takes most, on one state and without rounds of improvement, which take no more;
what is counted is resident memory.  ``calibrate.peak.said``: what the plan of memory says of that
layer, and the same measurement: a walk decides by the plan what to cut.
``calibrate.peak.host``: host memory beyond the weights with 64 states of 1536 tokens of 3072 features,
through blocks with one small layer, against 8 GB.  ``calibrate.host.states``: the same with a quarter
of the states; the file holds them, so the ratio is near 1.
``calibrate.layer_seconds``: rounding a 3072 x 12288 layer to int2 with all rounds, CPU-seconds on one
core.  Its rows are independent, so 64 and 192 of them are rounded and the rest follows; the
factorizations are whole.  ``calibrate.flux_hours``: the same for all layers of 19 double and 38 single
blocks; passes through the model not counted.  With a GPU, seconds there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.rounding import (
    Gathering,
    Limits,
    RoundingSettings,
    calibrate_layer,
    calibrate_module,
    grid_of,
)
from qsched_core.rounding.plan import Need

from ._common import BenchRow, machine, report

WIDTH, TOKENS, STATES = 3072, 1536, 64
DEVICE_BYTES, HOST_BYTES = 6e9, 8e9
BLOCK = {
    "linear1": (21504, 3072), "linear2": (3072, 15360), "qkv": (9216, 3072),
    "img_mlp_0": (12288, 3072), "img_mlp_2": (3072, 12288),
}  # fmt: skip
DOUBLE = [(18432, 3072), (9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)] * 2
SINGLE = [(21504, 3072), (3072, 15360), (9216, 3072)]
LAYER, SOME = (3072, 12288), (64, 192)
GROUPS = ("peak", "host", "layer")


class Block(nn.Module):
    """Layers of the given shapes, one after another, with inputs as wide as each needs."""

    def __init__(self, shapes: Iterable[tuple[int, int]], device: torch.device):
        super().__init__()
        made = [nn.Linear(i, o, device=device, dtype=torch.bfloat16) for o, i in shapes]
        self.layers = nn.ModuleDict({str(k): layer for k, layer in enumerate(made)})

    def forward(self, x):
        for layer in self.layers.values():
            wide = torch.cat([x, x.sin(), x.cos(), x.tanh(), x.abs()], -1)
            more = torch.tanh(layer(wide[..., : layer.in_features])[..., :WIDTH])
            x = x + nn.functional.pad(more, (0, WIDTH - more.shape[-1]))
        return x


class Net(nn.Module):
    def __init__(self, blocks: Iterable[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class RandomStates:
    """``count`` states of ``tokens`` rows that are made when they are asked for."""

    def __init__(self, model: nn.Module, count: int, tokens: int, device: torch.device):
        self.model, self.count, self.tokens, self.device = model, count, tokens, device
        self.batch = 1

    def __len__(self) -> int:
        return self.count

    def parts(self, size: int) -> list[slice]:
        return [slice(k, min(self.count, k + size)) for k in range(0, self.count, size)]

    @torch.no_grad()
    def run(self, part: slice) -> torch.Tensor:
        states = []
        for k in range(self.count)[part]:
            random = torch.Generator().manual_seed(k)
            mix = torch.randn(64, WIDTH, generator=random)
            states.append(torch.randn(self.tokens, 64, generator=random) @ mix / 8)
        return self.model(torch.stack(states).to(self.device, torch.bfloat16))


def apart(work: Callable, *arguments) -> tuple:
    """What ``work`` gives in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_told, (work, arguments))


def _told(work: Callable, arguments: tuple):
    try:
        return work(*arguments)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None  # which can be sent


def resident() -> int:
    """The most bytes that this process had in memory so far."""
    import resource  # Windows has none

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def walk(shapes: list[list[tuple[int, int]]], count: int, tokens: int, rounds: int, gpu: bool):
    """Peak bytes of a walk beyond the weights, of the device and of the host."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    model = Net(Block(each, device) for each in shapes)
    settings = RoundingSettings(rounds=rounds)
    host = resident()
    before = torch.cuda.memory_allocated() if gpu else host
    policy = Policy("int2", parse_overrides("@linear=int2"))
    with tempfile.TemporaryDirectory() as folder:
        states = RandomStates(model, count, tokens, device)
        limits = Limits(scratch=Path(folder), tell=print)
        calibrate_module(model, states, policy, settings, limits=limits)
    most = torch.cuda.max_memory_allocated() if gpu else resident()
    return most - before, resident() - host


def peak_rows() -> list[BenchRow]:
    gpu, here = torch.cuda.is_available(), machine()
    large = Need(*BLOCK["linear2"], 1)
    if gpu:
        shapes, count, rounds, what = [list(BLOCK.values())], 4, 2, "one block, of the device"
    else:
        shapes, count, rounds, what = [[BLOCK["linear2"]]], 1, 0, "linear2 alone, resident"
    most, _ = apart(walk, shapes, count, TOKENS, rounds, gpu)
    rows = [
        BenchRow(
            "calibrate.peak", f"{what}, beyond the weights, against 6 GB", most / 1e9,
            DEVICE_BYTES / 1e9, most / DEVICE_BYTES, "GB", 1, here, "<= 1",
        )
    ]  # fmt: skip
    if not gpu:
        rows.append(
            BenchRow(
                "calibrate.peak.said", "what the plan of memory says, and what was measured",
                large.work / 1e9, most / 1e9, large.work / most, "GB", 1, here, ">= 0.9",
            )
        )  # fmt: skip
    return rows


def host_rows() -> list[BenchRow]:
    here, small = machine(), [[(64, 256)], [(64, 256)]]
    most, few = (apart(walk, small, n, TOKENS, 0, False)[1] for n in (STATES, STATES // 4))
    return [
        BenchRow(
            "calibrate.peak.host", f"{STATES} states of {TOKENS} tokens, against 8 GB", most / 1e9,
            HOST_BYTES / 1e9, most / HOST_BYTES, "GB", 1, here, "<= 1",
        ),
        BenchRow(
            "calibrate.host.states", f"{STATES} states, and a quarter of them", most / 1e9, few / 1e9,
            most / few, "GB", 1, here, "<= 1.3",
        ),
    ]  # fmt: skip


def layer_times(counts: tuple[int, ...], gpu: bool) -> list[float]:
    """Seconds that layers with so many rows take."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    clock = time.perf_counter if gpu else time.process_time
    columns = LAYER[1]
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(256, columns, generator=random)
    x = torch.randn(512, 256, generator=random) @ mix / 16
    x = (x + 0.3 * torch.randn(512, columns, generator=random)).to(device)
    times = []
    for rows in counts:
        weight = torch.randn(rows, columns, generator=random).to(device) * 0.02
        sums = Gathering()
        sums.add(x, 0.98 * x)
        began = clock()
        calibrate_layer(grid_of("int2"), weight, None, sums.parts(), spend=True)
        if gpu:
            torch.cuda.synchronize()
        times.append(clock() - began)
    return times


def layer_rows() -> list[BenchRow]:
    gpu, here = torch.cuda.is_available(), machine()
    counts = (LAYER[0] // 2, LAYER[0]) if gpu else SOME
    few, more = apart(layer_times, counts, gpu)
    by_row = (more - few) / (counts[1] - counts[0])
    fixed = few - by_row * counts[0]

    def seconds(shape: tuple[int, int]) -> float:
        wide = shape[1] / LAYER[1]
        return fixed * wide**3 + by_row * shape[0] * wide**2

    layer = seconds(LAYER)
    hours = (19 * sum(map(seconds, DOUBLE)) + 38 * sum(map(seconds, SINGLE))) / 3600
    unit = "s" if gpu else "s CPU"
    return [
        BenchRow(
            "calibrate.layer_seconds", "3072 x 12288 to int2, and its factorizations", layer, fixed,
            layer / max(fixed, 1e-9), unit, 1, here,
        ),
        BenchRow(
            "calibrate.flux_hours", "all layers of FLUX.1, extrapolated, and its linear2 layers",
            hours, 38 * seconds(SINGLE[1]) / 3600, hours / (38 * seconds(SINGLE[1]) / 3600), "h",
            1, here,
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    options = parser.parse_args()
    made = {"peak": peak_rows, "host": host_rows, "layer": layer_rows}
    rows: list[BenchRow] = []
    for name in options.only:
        rows += made[name]()
        report(rows, options.json)


if __name__ == "__main__":
    main()
