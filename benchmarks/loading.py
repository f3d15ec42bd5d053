"""Quantized loading: sizes, peak memory, speed and LoRA, against ComfyUI's own ways and GGUF's.

Sizes are counted over the published models' shapes.  The rest is measured on FLUX-like models with
random weights in files that are written to a temporary folder: two gigabytes of true-width blocks
for the memory, and a narrower model for the time of whole forwards, on the CPU.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch

from qsched_core.formats import get
from qsched_core.formats.policy import Policy, is_modulation

from . import _memory
from ._common import BenchRow, machine, medians, options, report
from ._families import FAMILIES, FLUX_SCHNELL, Family, weights, write_random
from ._host import import_pack

SIZES = (  # format, family, bound
    ("nf4", "flux", 3.75),
    ("nf4", "sd35", 3.7),
    ("nf4", "sdxl", 3.7),
    ("nf4", "sd15", 3.6),
    ("int2", "flux", 5.0),
)
# 1.15 billion weights, 2.3 GB: blocks of FLUX's own width.
WIDE = FLUX_SCHNELL.smaller("wide", depth=2, depth_single_blocks=3)
NARROW = FLUX_SCHNELL.smaller(
    "narrow", hidden_size=1536, num_heads=12, depth=2, depth_single_blocks=4
)
SMALL = FLUX_SCHNELL.smaller("small", hidden_size=768, num_heads=6, depth=3, depth_single_blocks=3)
TEXT = 64  # tokens of text beside the picture's
RANK, STRENGTH = 16, 0.02  # of the LoRA: its change of a weight is .08 of the weight

_machine = cache(machine)


def row(name: str, what: str, ours, other, ratio, unit: str, n: int = 1, bound: str = ""):
    return BenchRow(name, what, ours, other, ratio, unit, n, _machine(), bound)


def skipped(name: str, what: str, why: str) -> BenchRow:
    return BenchRow(name, what, None, None, None, "", 0, _machine(), skipped=why)


# Sizes


@cache
def packed_bytes(weight_format: str, shape: tuple[int, ...]) -> int:
    return get(weight_format).packed_bytes(shape)


def stored_bytes(family: Family, policy: Policy) -> tuple[int, int]:
    """Bytes of all weights (as fp16, as stored with ``policy``); what is kept stays fp16."""
    half = stored = 0
    for weight in weights(family.module()):
        choice = policy(weight.layer, weight.shape, weight.kind) if weight.kind else None
        half += 2 * weight.count
        if choice is None or choice.format is None:
            stored += 2 * weight.count
        else:
            stored += packed_bytes(choice.format, weight.shape)
    return half, stored


def size_rows(folder: Path, runs: int) -> Iterator[BenchRow]:
    for weight_format, family, bound in SIZES:
        half, stored = stored_bytes(FAMILIES[family], Policy(weight_format))
        count = half // 2
        yield row(
            f"size.{weight_format}.{family}",
            f"fp16 over {weight_format}, {count / 1e9:.2f} billion weights, "
            f"{8 * stored / count:.3f} bits each",
            stored / 1e9,
            half / 1e9,
            half / stored,
            "GB",
            bound=f">= {bound}",
        )


# Peak memory


def memory_rows(folder: Path, runs: int) -> Iterator[BenchRow]:
    what = {
        "ours": "quantized to nf4 while it loads",
        "naive": "ComfyUI's loading, then nf4",
        "stock": "ComfyUI's loading",
        "stock_fp8": "ComfyUI's loading with weight_dtype fp8_e4m3fn",
    }
    ids = {way: f"load_peak.{way}" for way in _memory.WAYS} | {
        "ours": "load_peak.nf4",
        "naive": "load_peak.naive_nf4",
    }
    why = _memory.unsupported()
    if why:
        yield from (skipped(ids[way], what[way], why) for way in _memory.WAYS)
        return
    path = folder / "wide.safetensors"
    write_random(WIDE, path)
    size = path.stat().st_size
    for way in _memory.WAYS:
        peak = _memory.peak_of_load(way, path)
        yield row(
            ids[way],
            f"peak memory over the file's size; {what[way]}, {peak.after / 1e9:.2f} GB in the end",
            peak.most / 1e9,
            size / 1e9,
            peak.most / size,
            "GB",
            bound="<= 0.45" if way == "ours" else "",
        )
    path.unlink()


# Whole forwards


def inputs(batch: int, side: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """What ``apply_model`` takes, for pictures of ``side`` times ``side`` tokens."""
    random = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=random)
    x, sigma = draw(batch, 16, 2 * side, 2 * side), torch.full((batch,), 0.8)
    return x, sigma, {"c_crossattn": draw(batch, TEXT, 4096), "y": draw(batch, 768)}


@torch.no_grad()
def forward(model, arguments) -> torch.Tensor:
    x, sigma, conditions = arguments
    return model.model.apply_model(x, sigma, **conditions)


def loaded(model):
    importlib.import_module("comfy.model_management").load_models_gpu([model])
    return model


def stock_model(path: Path, **choices):
    """ComfyUI's own loading; ``dtype`` as the node's weight_dtype."""
    return importlib.import_module("comfy.sd").load_diffusion_model(str(path), choices)


def bf16_model(path: Path):
    """Weights and arithmetic in bf16, without a cast anywhere."""
    plain = importlib.import_module("comfy.ops").disable_weight_init
    model = stock_model(path, dtype=torch.bfloat16, custom_operations=plain)
    model.model.manual_cast_dtype = None
    return model


def step_rows(folder: Path, runs: int) -> Iterator[BenchRow]:
    """One forward of the same model after each way of loading, on one thread."""
    loading, threads = import_pack(), torch.get_num_threads()
    path = folder / "narrow.safetensors"
    write_random(NARROW, path)
    ours = {
        name: partial(loading.load_diffusion_model, str(path), loading.Request(name))
        for name in ("int8", "nf4")
    }
    bf16 = ("bf16 weights and arithmetic", partial(bf16_model, path))
    stock = ("ComfyUI's loading", partial(stock_model, path))
    fp8 = ("weight_dtype fp8_e4m3fn", partial(stock_model, path, dtype=torch.float8_e4m3fn))
    comparisons = (
        ("step.int8_vs_bf16", "int8", bf16, 16, ">= 1.15"),
        ("step.int8_vs_bf16.1024", "int8", bf16, 32, ""),
        ("step.nf4_vs_stock", "nf4", stock, 16, ">= 1.0"),
        ("step.int8_vs_stock", "int8", stock, 16, ""),
        ("step.nf4_vs_bf16", "nf4", bf16, 16, ""),
        ("step.nf4_vs_fp8", "nf4", fp8, 16, ""),
    )
    torch.set_num_threads(1)
    try:
        for name, weight_format, (what, other), side, bound in comparisons:
            few = max(2, runs // 3)  # a CPU without bf16 takes a minute a step there
            times = runs if side == 16 else few
            yield _step(name, ours[weight_format], what, other, side, times, bound)
    finally:
        torch.set_num_threads(threads)
        path.unlink()


def _step(name: str, ours: Callable, what: str, other: Callable, side: int, runs: int, bound: str):
    pair, arguments = (loaded(ours()), loaded(other())), inputs(1, side)
    ours_s, other_s = medians(*(partial(forward, model, arguments) for model in pair), runs)
    types = [str(m.model.get_dtype_inference()).removeprefix("torch.") for m in pair]
    tokens = side * side + TEXT
    return row(
        name,
        f"{what} (computes in {types[1]}) over ours (in {types[0]}), {tokens} tokens, one thread",
        ours_s,
        other_s,
        other_s / ours_s,
        "s/step",
        runs,
        bound,
    )


# Dequantization


def dequantize_rows(folder: Path, runs: int) -> Iterator[BenchRow]:
    """Every quantized layer of the same model back to fp32, once, by GGUF's functions and ours."""
    pairs = (("nf4", "Q4_0"), ("int8", "Q8_0"))
    try:
        quants = importlib.import_module("gguf.quants")
        types = importlib.import_module("gguf").GGMLQuantizationType
    except ImportError as error:
        for ours, other in pairs:
            name = f"dequantize.{ours}_vs_gguf_{other.lower()}"
            yield skipped(name, f"GGUF {other} over {ours}", f"{error}; pip install gguf")
        return
    random, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    layers = [w for w in weights(NARROW.smaller(depth=1, depth_single_blocks=1).module()) if w.kind]
    torch.set_num_threads(1)
    for ours, other in pairs:
        form, policy = get(ours), Policy(ours)
        chosen = [w for w in layers if policy(w.layer, w.shape, w.kind).format == ours]
        full = [torch.randn(w.shape, generator=random) for w in chosen]
        packed = [form.quantize(weight) for weight in full]
        blocks = [quants.quantize(weight.numpy(), types[other]) for weight in full]
        ours_s, other_s = medians(
            lambda form=form, packed=packed: [form.dequantize(p) for p in packed],
            lambda other=other, blocks=blocks: [quants.dequantize(b, types[other]) for b in blocks],
            runs,
        )
        found = [torch.from_numpy(quants.dequantize(b, types[other])) for b in blocks]
        count = sum(w.count for w in chosen)
        bits = [8 * sum(p.nbytes for p in part) / count for part in (packed, blocks)]
        errors = (_error([form.dequantize(p) for p in packed], full), _error(found, full))
        yield row(
            f"dequantize.{ours}_vs_gguf_{other.lower()}",
            f"GGUF {other} ({bits[1]:.3f} bits, relative error {errors[1]:.4f}) over {ours} "
            f"({bits[0]:.3f} bits, {errors[0]:.4f}), {len(chosen)} layers to fp32, one thread",
            ours_s,
            other_s,
            other_s / ours_s,
            "s",
            runs,
        )
    torch.set_num_threads(threads)


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """|found - wanted| / |wanted| over all layers."""
    error = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
    return (error / sum(b.square().sum() for b in wanted)).sqrt().item()


# LoRA


def lora_of(family: Family, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA on the attention and feed-forward layers of every block."""
    random, lora = torch.Generator().manual_seed(seed), {}
    for weight in weights(family.module()):
        if "_blocks." not in weight.layer or not weight.kind or is_modulation(weight.layer):
            continue
        out, width = weight.shape
        key = f"diffusion_model.{weight.layer}"
        lora[f"{key}.lora_A.weight"] = torch.randn(RANK, width, generator=random) / width**0.5
        lora[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=random) * STRENGTH
    return lora


def lora_rows(folder: Path, runs: int) -> Iterator[BenchRow]:
    """How far nf4 is from the unquantized model with a LoRA on both, over the same without."""
    loading, comfy = import_pack(), importlib.import_module("comfy.sd")
    path = folder / "small.safetensors"
    write_random(SMALL, path)
    arguments = inputs(4, 8)

    def with_lora(model, lora, add=comfy.load_lora_for_models):
        return add(model, None, lora, 1.0, 0.0)[0]

    def distances(found: dict[str, torch.Tensor], wanted: torch.Tensor) -> dict[str, float]:
        return {k: ((v - wanted).norm() / wanted.norm()).item() for k, v in found.items()}

    plain = stock_model(path)
    model = loading.load_diffusion_model(str(path), loading.Request("nf4"))
    wanted, bare = once(plain, arguments), once(model, arguments)
    without = distances({"nf4": bare}, wanted)["nf4"]
    every: dict[str, list[float]] = {"runtime": [], "baked": [], "bypass": [], "lost": []}
    effects = []
    for seed in range(max(1, runs // 2)):
        lora = lora_of(SMALL, seed)
        changed = once(with_lora(plain, lora), arguments)
        effects.append(distances({"": changed}, wanted)[""])
        bypass = with_lora(model, lora, comfy.load_bypass_lora_for_models)
        found = {
            "runtime": once(with_lora(model, lora), arguments, offloaded=True),
            "baked": once(with_lora(model, lora), arguments),
            "bypass": once(bypass, arguments),
            "lost": bare,
        }
        for kind, distance in distances(found, changed).items():
            every[kind].append(distance)
    path.unlink()
    effect = statistics.mean(effects)
    for kind, what in (
        ("runtime", "added to the dequantized weight in each forward (weights offloaded)"),
        ("baked", "rounded into the nf4 weights"),
        ("bypass", "ComfyUI's bypass loader"),
        ("lost", "left out, for comparison"),
    ):
        with_it = statistics.mean(every[kind])
        yield row(
            f"lora.nf4_{kind}",
            f"distance of nf4 to the unquantized model with a LoRA (which moves that by "
            f"{effect:.3f}), over that without; {what}",
            with_it,
            without,
            with_it / without,
            "relative",
            len(effects),
            "<= 1.1" if kind == "runtime" else "",
        )


def once(model, arguments, offloaded: bool = False) -> torch.Tensor:
    """One forward with the model's patches, which are then taken off again."""
    management = importlib.import_module("comfy.model_management")
    management.unload_all_models()
    if offloaded:
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
        found = forward(model, arguments)
        model.unpatch_model()
        return found
    found = forward(loaded(model), arguments)
    management.unload_all_models()
    return found


GROUPS = {
    "size": size_rows,
    "memory": memory_rows,
    "step": step_rows,
    "dequantize": dequantize_rows,
    "lora": lora_rows,
}


def main() -> None:
    args = options(__doc__, runs=7, groups=tuple(GROUPS))
    import_pack()
    logging.disable(logging.INFO)
    rows = []
    with tempfile.TemporaryDirectory(prefix="qsched-bench-") as folder:
        for name in args.only:
            rows += GROUPS[name](Path(folder), args.runs)
    report(rows, args.json)


if __name__ == "__main__":
    main()
