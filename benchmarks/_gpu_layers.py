"""Rows about single layers: products, unpacking, integer products, LoRA, calibrated rounding."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from qsched_core import kernels
from qsched_core.devices import place
from qsched_core.formats import names
from qsched_core.formats.grouped import GroupedFormat

from . import _gpu_gguf as gguf
from ._gpu_plan import Bench, Measured, Row, SkipRow
from ._shapes import LAYERS

FAMILIES = ("flux", "sd35", "sdxl")
GROUPED = ("int2", "int3", "w4a8", "nf4", "fp4")
WIDE = (12288, 3072)  # of FLUX's feed-forward layers
TOKENS = 4608  # of FLUX at 1024 times 1024 pixels
RANK = 16
COPY_BYTES = 1 << 29
WALK_BYTES = 6 << 30  # what calibrating weights takes of a card at most


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def shapes_of(bench: Bench, family: str) -> list[tuple[int, ...]]:
    """The family's linear layers, the widest and the most frequent; one of the size of a toy in tiny."""
    layers = {s: n for s, n in LAYERS[family].items() if len(s) == 2}
    chosen = {max(layers, key=lambda s: s[0] * s[1]), max(layers, key=layers.__getitem__)}
    return sorted({(96, 256)} if bench.tiny else chosen)


def product(name: str, family: str, bench: Bench) -> Measured:
    """The output's error against fp32, over the weight's own."""
    form, worst = bench.format(name), None
    for shape in shapes_of(bench, family):
        weight = bench.random(*shape).mul_(0.02)
        if form.unfit(shape) is not None:
            continue
        x = bench.random(20 if bench.tiny else 1024, shape[1], seed=1)
        packed = form.quantize(weight, measure=True)
        error = relative(form.linear(x.to(bench.dtype), packed), x @ weight.t())
        found = (error / packed.error, error, packed.error, shape)
        worst = found if worst is None else max(worst, found)
    if worst is None:
        raise SkipRow(f"no layer of {family} fits")
    ratio, ours, other, shape = worst
    detail = {"shape": list(shape), "backend": form.backend(bench.device)}
    return Measured(ours, other, ratio, "relative error", detail=detail)


def equal(name: str, bench: Bench) -> Measured:
    """Triton's values against torch's on the CPU: the largest difference, in fp32 and in 16 bits."""
    form, engine = bench.format(name), "triton"
    _need(bench, engine)
    packed = form.quantize(bench.random(33, 130).mul_(0.02).cpu())
    there, wanted = packed.to(bench.device), form.unpack_by("torch", packed, torch.float32)
    found = {
        str(dtype).removeprefix("torch."): float(
            (form.unpack_by(engine, there, dtype).cpu().float() - wanted.to(dtype).float())
            .abs()
            .max()
        )
        for dtype in kernels.engines.DTYPES
    }
    return Measured(max(found.values()), 0.0, None, "difference", detail=found)


def _need(bench: Bench, engine: str) -> None:
    if engine == "triton":
        chosen, refused = kernels.choose(place(bench.device), bench.dtype, bench.device)
        if chosen != "triton":
            raise SkipRow(refused["triton"])


def copy_speed(bench: Bench) -> float:
    """Bytes a second that the device reads and writes when it copies."""
    if "copy" not in bench.kept:
        size = 1 << 20 if bench.tiny else COPY_BYTES
        source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        (once,) = bench.seconds(lambda: target.copy_(source))
        bench.kept["copy"] = 2 * size / once
    return bench.kept["copy"]


def unpacking(name: str, engine: str, bench: Bench) -> Measured:
    """GB/s read and written while a weight is dequantized to 16 bits, and while memory is copied."""
    shape = (96, 256) if bench.tiny else WIDE
    copy = copy_speed(bench)
    weight = bench.random(*shape).mul_(0.02)
    if engine == "gguf":
        data = gguf.quantize(weight, name)
        call, stored = partial(gguf.dequantize, data, name, shape, bench.dtype), data.numel()
    else:
        form = bench.format(name)
        packed = form.quantize(weight)
        stored = packed.nbytes
        if isinstance(form, GroupedFormat):
            _need(bench, engine)
            call = partial(form.unpack_by, engine, packed, bench.dtype)
        else:
            call = partial(form.dequantize, packed, bench.dtype)
    (once,) = bench.seconds(call)
    moved = stored + 2 * weight.numel()
    detail = {"seconds": once, "bits": 8 * stored / weight.numel(), "shape": list(shape)}
    return Measured(moved / once / 1e9, copy / 1e9, moved / once / copy, "GB/s", bench.runs, detail)


def speed(name: str, tokens: int, bench: Bench) -> Measured:
    """A layer's product in 16 bits over that in the format."""
    form, shape = bench.format(name), (96, 256) if bench.tiny else WIDE
    weight = bench.random(*shape).mul_(0.02)
    x = bench.random(20 if bench.tiny else tokens, shape[1]).to(bench.dtype)
    packed, half = form.quantize(weight), weight.to(bench.dtype)
    ours, other = bench.seconds(
        partial(form.linear, x, packed), partial(functional.linear, x, half)
    )
    detail = {"backend": form.backend(bench.device), "tokens": len(x), "shape": list(shape)}
    return Measured(ours, other, other / ours, "s", bench.runs, detail)


def lora(name: str, bench: Bench) -> Measured:
    """A layer whose weight gets a LoRA of rank 16 added in each forward, over the layer without."""
    form, shape = bench.format(name), (96, 256) if bench.tiny else WIDE
    packed = form.quantize(bench.random(*shape).mul_(0.02))
    x = bench.random(20 if bench.tiny else TOKENS, shape[1]).to(bench.dtype)
    up = bench.random(shape[0], RANK, seed=1).to(bench.dtype).mul_(0.01)
    down = bench.random(RANK, shape[1], seed=2).to(bench.dtype).mul_(0.01)

    def patched():
        return functional.linear(x, form.dequantize(packed, bench.dtype).addmm_(up, down))

    ours, other = bench.seconds(patched, partial(form.linear, x, packed))
    return Measured(ours, other, ours / other, "s", bench.runs)


BLOCKS = {  # the layers of one block of FLUX, and how many inputs each has
    "double": (((9216, 3072), 2), ((3072, 3072), 2), ((12288, 3072), 2), ((3072, 12288), 2)),
    "single": (((21504, 3072), 1), ((3072, 15360), 1)),
}


def calibrating(name: str, block: str, bench: Bench) -> Measured:
    """Minutes and GB of rounding one block's weights for their inputs, and of plain rounding."""
    rounding, plan = (
        importlib.import_module(f"qsched_core.rounding{name}") for name in ("", ".plan")
    )
    grid, form = rounding.grid_of(name), bench.format(name)
    calibrated = plain = 0.0
    errors, blocks = [], []
    for shape, count in BLOCKS[block]:
        shape = (64, 128) if bench.tiny else shape
        weight = bench.random(*shape).mul_(0.02)
        mix = bench.random(shape[1], 256, seed=3)
        # As a walk on this card: in at most half of its memory, wide layers a part at a time.
        need = plan.needs({block: shape}, min(WALK_BYTES, bench.memory // 2))[block]
        blocks.append(need.blocks)
        sums = rounding.Gathering(need.cuts)
        for part in range(2 if bench.tiny else 8):
            x = bench.random(512, 256, seed=part) @ mix.t() + bench.random(512, shape[1], seed=part)
            sums.add(*grid.pair(x, x))
        bench.sync()
        started = time.perf_counter()
        form.quantize(weight)
        bench.sync()
        plain += count * (time.perf_counter() - started)
        started = time.perf_counter()
        found = rounding.calibrate_layer(grid, weight, None, sums.parts(), spend=True)
        bench.sync()
        calibrated += count * (time.perf_counter() - started)
        errors.append(found.error / found.plain_error)
    detail = {"peak_gb": bench.peak(), "error_over_plain": errors, "parts": blocks}
    return Measured(
        calibrated / 60, plain / 60, calibrated / max(plain, 1e-9), "minutes", 1, detail
    )


def correctness() -> Iterator[Row]:
    for name in GROUPED:
        yield Row(
            f"unpack_equal.{name}", f"Triton's {name} weights against torch's on the CPU", 0.1, 3,
            partial(equal, name), format=name,
        )  # fmt: skip
    for family in FAMILIES:
        for name in names():
            yield Row(
                f"product.{family}.{name}",
                f"error of {name} products against fp32, over the weight's own, {family}'s layers",
                2.5, 1.5, partial(product, name, family), format=name,
            )  # fmt: skip


def bandwidth() -> Iterator[Row]:
    for name in names():
        engines = ["torch"]
        if name in GROUPED:
            engines = ["triton", "torch"] + (["bitsandbytes"] if name in ("nf4", "fp4") else [])
        for engine in engines:
            needs = ("bitsandbytes",) if engine == "bitsandbytes" else ()
            yield Row(
                f"dequantize.{name}.{engine}", f"{name} to bf16 by {engine}, over a copy's GB/s",
                1.5, 2, partial(unpacking, name, engine), needs, name,
            )  # fmt: skip
    for kind in gguf.BYTES:
        yield Row(
            f"dequantize.gguf_{kind}.torch", f"GGUF {kind} to bf16 in torch, over a copy's GB/s",
            1.5, 2, partial(unpacking, kind, "gguf"),
        )  # fmt: skip


LOW_BIT = (
    "int8", "int8_convrot", "llm_int8", "fp8_e4m3", "w4a8", "w4a8_convrot", "w4a4",
    "svdquant_w4a4", "nvfp4", "mxfp8",
)  # fmt: skip


def integer_speed() -> Iterator[Row]:
    for tokens in (TOKENS, 1024):
        for name in LOW_BIT:
            yield Row(
                f"speed.{name}.{tokens}", f"bf16 over {name}, {tokens} tokens, {WIDE[1]} to {WIDE[0]}",
                1.5, 2, partial(speed, name, tokens), format=name,
            )  # fmt: skip


def loras() -> Iterator[Row]:
    for name in ("nf4", "int8", "int2", "w4a8"):
        yield Row(
            f"lora.{name}", f"{name} with a LoRA added at run time, over without",
            1.5, 2, partial(lora, name), format=name,
        )  # fmt: skip


def rounding() -> Iterator[Row]:
    for name in ("int2", "nf4", "w4a8"):
        for block in BLOCKS:
            yield Row(
                f"calibrate.{name}.flux_{block}",
                f"rounding a {block} block of FLUX for its inputs with {name}, over plain rounding",
                4, 40, partial(calibrating, name, block), ("optuna",), name,
            )  # fmt: skip
