"""Rows about whole models: steps, files, offloading, batches."""

from __future__ import annotations

import json
import math
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from qsched_core.formats import get
from qsched_core.formats.files import MappedFile
from qsched_core.formats.module import QuantizedConv2d, QuantizedLinear
from qsched_core.formats.policy import Choice, Policy

from . import _gpu_gguf as gguf
from ._gpu_models import SHAPES, TINY, Shape, inputs, random_weight, replace
from ._gpu_plan import Bench, Measured, Row, SkipRow

FORMATS = (
    "nf4", "int8", "int8_convrot", "int3", "int2", "w4a8", "w4a8_convrot", "fp8_e4m3", "w4a4",
    "svdquant_w4a4", "nvfp4", "mxfp8", "llm_int8",
)  # fmt: skip
ARMS = {  # of each family, the most telling first
    "flux": ("nf4", "gguf_q4_0", *FORMATS[1:], "gguf_q8_0"),
    "sd35": ("nf4", "gguf_q4_0", "int8", "int2", "w4a8", "fp8_e4m3", "nvfp4"),
    "sdxl": ("nf4", "gguf_q4_0", "int8", "int2", "w4a8", "fp8_e4m3", "nvfp4"),
}
WIDE = (12288, 3072)
FILE_LAYERS = 10  # of WIDE: 0.75 GB in 16 bits
FREE_GB = 3  # of a card for latents, text and temporaries
PINNED = 1.35  # FLUX's layers, each rounded up to a power of two
MOST_BATCHES = 64


def shape_of(bench: Bench, family: str) -> Shape:
    return (TINY if bench.tiny else SHAPES)[family]


@cache
def bytes_of(arm: str) -> float:
    """Of one weight of a wide layer."""
    return 2.0 if arm == "bf16" else get(arm).packed_bytes(WIDE) / math.prod(WIDE)


def share_of(bench: Bench, shape: Shape, arm: str = "bf16") -> float:
    """The share of the depth with which the model in ``arm`` takes at most .6 of the memory."""
    return min(1.0, 0.6 * bench.memory / (1e9 * bytes_of(arm) * shape.weights))


class Packing:
    """Weights of a model in one of the arms; each shape is packed once, and copied for its layers."""

    def __init__(self, bench: Bench, arm: str):
        self.bench, self.arm = bench, arm
        self.random = torch.Generator(bench.device).manual_seed(0)
        self.policy = None if arm == "bf16" or arm.startswith("gguf") else Policy(arm)
        self.known: dict[tuple, object] = {}

    def __call__(self, name: str, layer: nn.Module) -> nn.Module:
        shape, kind = (
            tuple(layer.weight.shape),
            "linear" if isinstance(layer, nn.Linear) else "conv2d",
        )
        bias = None
        if layer.bias is not None:
            bias = torch.zeros(shape[0], device=self.bench.device, dtype=self.bench.dtype)
        choice = Choice(None) if self.policy is None else self.policy(name, shape, kind)
        if choice.format is not None:
            return self.quantized(layer, shape, kind, bias, choice)
        if self.arm.startswith("gguf") and kind == "linear":
            data = self.once(shape, "gguf", lambda w: gguf.quantize(w, self.arm[5:]))
            return gguf.GGUFLinear(data.clone(), self.arm[5:], shape, bias)
        layer.weight = nn.Parameter(self.weight(shape), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    def weight(self, shape) -> torch.Tensor:
        return random_weight(torch.Size(shape), self.bench.device, self.bench.dtype, self.random)

    def once(self, shape, key, pack: Callable):
        if (shape, key) not in self.known:
            self.known[shape, key] = pack(self.weight(shape))
        return self.known[shape, key]

    def quantized(self, layer, shape, kind, bias, choice: Choice) -> nn.Module:
        packed = self.once(shape, choice.format, get(choice.format).quantize)
        aux = {name: table.clone() for name, table in packed.aux.items()}
        packed = type(packed)(packed.codes.clone(), aux, packed.shape, packed.options)
        if kind == "linear":
            return QuantizedLinear(packed, bias, choice)
        return QuantizedConv2d(layer, packed, choice, bias)


def made(bench: Bench, shape: Shape, arm: str, share: float, pack: Callable | None = None):
    with torch.device("meta"):
        model = shape.make(share)
    return replace(model, pack or Packing(bench, arm)).eval()


@torch.no_grad()
def forward(model: nn.Module, arguments: list[torch.Tensor]) -> torch.Tensor:
    return model(*arguments)


def half_step(bench: Bench, family: str) -> float:
    """Seconds of a forward of the model in bf16, measured once."""
    if ("bf16", family) not in bench.kept:
        shape = shape_of(bench, family)
        model = made(bench, shape, "bf16", share_of(bench, shape))
        arguments = inputs(shape, bench.device, bench.dtype)
        (bench.kept["bf16", family],) = bench.seconds(partial(forward, model, arguments))
        del model
        bench.clear()
    return bench.kept["bf16", family]


def step(family: str, arm: str, bench: Bench) -> Measured:
    """A forward of the model in bf16 over one of the arm's; both ran alone on the device."""
    if not arm.startswith("gguf"):
        bench.format(arm)
    other, shape = half_step(bench, family), shape_of(bench, family)
    share = share_of(bench, shape)
    model = made(bench, shape, arm, share)
    arguments = inputs(shape, bench.device, bench.dtype)
    out = forward(model, arguments)
    if not torch.isfinite(out).all():
        raise RuntimeError("the output is not finite")
    (ours,) = bench.seconds(partial(forward, model, arguments))
    detail = {"share_of_depth": round(share, 3), "peak_gb": bench.peak()}
    if not arm.startswith("gguf"):
        detail["backend"] = get(arm).backend(bench.device)
    return Measured(ours, other, other / ours, "s/step", bench.runs, detail)


def write_file(path: Path, count: int, shape: tuple[int, int]) -> None:
    """A safetensors file of ``count`` random bf16 weights."""
    size, header = 2 * shape[0] * shape[1], {}
    for k in range(count):
        places = (k * size, (k + 1) * size)
        header[f"{k}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": places}
    text = json.dumps(header).encode()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    data = weight.bfloat16().view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(data)


def load(name: str, bench: Bench) -> Measured:
    """Seconds from a file to quantized weights on the device, over those to bf16 ones."""
    form = bench.format(name)
    with tempfile.TemporaryDirectory(prefix="qsched-bench-") as folder:
        path = Path(folder) / "weights.safetensors"
        write_file(path, *((2, (96, 256)) if bench.tiny else (FILE_LAYERS, WIDE)))

        def read(change: Callable) -> tuple[float, float | None]:
            bench.clear()
            bench.sync()
            started, file = time.perf_counter(), MappedFile(path)
            kept = []
            for key in file.entries:
                kept.append(change(file.tensor(key).to(bench.device)))
                file.release(file.tensor(key))
            bench.sync()
            return time.perf_counter() - started, bench.peak()

        read(lambda weight: weight)  # the pages are in the system's cache for both
        other, other_peak = read(lambda weight: weight.clone())
        ours, peak = read(form.quantize)
        size = path.stat().st_size / 1e9
    detail = {"file_gb": size, "peak_gb": peak, "bf16_peak_gb": other_peak}
    return Measured(ours, other, ours / other, "s", 1, detail)


class Streamed(nn.Module):
    """A layer whose tensors wait in pinned memory and are copied to the device in each forward."""

    def __init__(self, layer: nn.Module, device: torch.device):
        super().__init__()
        self.device, pin = device, device.type == "cuda"
        self.kept = {
            name: tensor.data.cpu().pin_memory() if pin else tensor.data
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        }
        self.layer = [layer.to("meta")]  # no child: its tensors are these

    def forward(self, x):
        here = {n: t.to(self.device, non_blocking=True) for n, t in self.kept.items()}
        return torch.func.functional_call(self.layer[0], here, (x,))


def offloaded(gigabytes: int, arm: str, bench: Bench) -> Measured:
    """A step of FLUX where the weights that don't fit a card of that size are copied in each step."""
    if arm != "bf16":
        bench.format(arm)
    shape, pack = shape_of(bench, "flux"), Packing(bench, arm)
    room = 0.0 if bench.tiny else 1e9 * (gigabytes - FREE_GB)
    resident = streamed = 0

    def place(name: str, layer: nn.Module) -> nn.Module:
        nonlocal resident, streamed
        new = pack(name, layer)
        size = sum(t.nbytes for t in (*new.parameters(), *new.buffers()))
        if resident + size <= room:
            resident += size
            return new
        streamed += size
        return Streamed(new, bench.device)

    model = made(bench, shape, arm, 1.0, place)
    pack.known.clear()
    bench.clear()
    arguments = inputs(shape, bench.device, bench.dtype)
    if bench.cuda:
        share = gigabytes * 1e9 / torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), bench.device)
    try:
        (ours,) = bench.seconds(partial(forward, model, arguments))
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    other = bench.kept.get(("offloaded", gigabytes))
    if arm == "bf16":
        bench.kept["offloaded", gigabytes] = other = ours
    detail = {"resident_gb": resident / 1e9, "copied_gb": streamed / 1e9, "peak_gb": bench.peak()}
    return Measured(ours, other, other and other / ours, "s/step", bench.runs, detail)


def batches(family: str, arm: str, bench: Bench) -> Measured:
    """The largest batch (a power of two) of the search's forwards, and a picture's share of its time."""
    if arm != "bf16":
        bench.format(arm)
    shape, best, times = shape_of(bench, family), 0, {}
    share = share_of(bench, shape, arm)
    model = made(bench, shape, arm, share)
    batch = 1
    while batch <= (2 if bench.tiny else MOST_BATCHES):
        try:
            arguments = inputs(shape, bench.device, bench.dtype, batch)
            forward(model, arguments)
            bench.sync()
            started = time.perf_counter()
            forward(model, arguments)
            bench.sync()
        except torch.OutOfMemoryError:
            break
        best, times[batch] = batch, (time.perf_counter() - started) / batch
        batch *= 2
        if times[best] * batch > 8:  # seconds
            break
    if not best:
        raise SkipRow("not even one picture fits")
    detail = {"seconds_a_picture": times, "largest": best, "peak_gb": bench.peak()}
    detail["share_of_depth"] = round(share, 3)
    return Measured(times[best], times[1], times[1] / times[best], "s/picture", 1, detail)


def steps() -> Iterator[Row]:
    for family in SHAPES:
        for arm in ARMS[family]:
            yield Row(
                f"step.{family}.{arm}", f"a step of a {family}-shaped model, bf16 over {arm}",
                3, 8 if family == "flux" else 6,
                partial(step, family, arm), format="" if arm.startswith("gguf") else arm,
            )  # fmt: skip


def files() -> Iterator[Row]:
    for name in ("nf4", "int8", "int2"):
        yield Row(
            f"load.{name}", f"from a file of bf16 weights to {name} on the device, over to bf16",
            3, 8, partial(load, name), format=name,
        )  # fmt: skip


def offloading() -> Iterator[Row]:
    for gigabytes in (12, 8):
        for arm in ("bf16", "nf4", "int8", "int2"):
            yield Row(
                f"offload.{gigabytes}gb.{arm}",
                f"a step of FLUX's shape with {gigabytes} GB, bf16 over {arm}",
                gigabytes - FREE_GB / 2, 25 if arm == "bf16" else 12,
                partial(offloaded, gigabytes, arm), format="" if arm == "bf16" else arm,
                host_gb=pinned_gb(gigabytes, arm),
            )  # fmt: skip


def pinned_gb(gigabytes: int, arm: str) -> float:
    """What waits on the host, pinned: each tensor takes a power of two of bytes there."""
    copied = bytes_of(arm) * SHAPES["flux"].weights - (gigabytes - FREE_GB)
    return max(0.0, PINNED * copied)


def batch_sizes() -> Iterator[Row]:
    for family in SHAPES:
        yield Row(
            f"batch.{family}.nf4", f"pictures at once that a search with {family}'s shape can use",
            3, 15, partial(batches, family, "nf4"), format="nf4",
        )  # fmt: skip
