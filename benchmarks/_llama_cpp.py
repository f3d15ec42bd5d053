"""The demo model in llama.cpp's quantizers, beside the calibrated formats.

Each quantizer is given what it is made for: a weight a layer, and with an importance matrix how much
each input counts (its mean square over the calibration states of the unquantized model).  Layers are
those that our policy quantizes.  Modulation gets Q4_K, as it gets 4 bits from us, or in the arms
named ``all`` the same type as the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from demo.task import full
from devtools.console import SetupError
from qsched_core.formats.policy import Choice, Policy
from qsched_core.objective import Objective
from qsched_core.prompts import CalibrationPrompts, PromptSet
from qsched_core.rounding import TaskSubject, WeightsResult, choices
from qsched_core.rounding.proof import Arm, details, distances, final_latents, jaq
from qsched_core.rounding.subject import Subject
from qsched_core.statistics import paired_interval

from ._common import BenchRow, machine
from ._ggml import VERSION, Ggml, fallback, library

QUANTIZERS = ("Q2_K", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q3_K", "Q4_K")
MODULATION = "Q4_K"
# Calibrated format, quantizer, bound of the distances' ratio.
HEADLINES = (("int2", "IQ2_S", "<= 0.35"), ("int3", "Q4_K", "<= 1.0"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One way to quantize the model; ``all``: modulation is not spared."""

    quantizer: str
    importance: bool
    all: bool = False

    @property
    def name(self) -> str:
        parts = ("imatrix" if self.importance else "", "all" if self.all else "")
        return ".".join((self.quantizer.lower(), *filter(None, parts)))

    def type_of(self, choice: Choice, columns: int) -> str:
        spared = choice.weight_only and not self.all
        return fallback(MODULATION if spared else self.quantizer, columns)


@dataclass(frozen=True)
class Measured:
    """A setting's model on the held-out prompts; ``types`` counts layers by what they got."""

    setting: Setting
    arm: Arm
    bits: float
    types: Mapping[str, int]

    def __str__(self) -> str:
        types = ", ".join(f"{count} x {name}" for name, count in sorted(self.types.items()))
        matrix = "with" if self.setting.importance else "without"
        return (
            f"{self.setting.quantizer} of ggml {VERSION} {matrix} importance matrix "
            f"({self.bits:.3f} bits: {types})"
        )


def settings(ggml: Ggml) -> Iterator[Setting]:
    for quantizer in QUANTIZERS:
        if not ggml.requires_importance(quantizer):
            yield Setting(quantizer, False)
        yield Setting(quantizer, True)
        if quantizer != MODULATION:
            yield Setting(quantizer, True, all=True)


def compare(
    results: Mapping[str, WeightsResult],
    prompts: CalibrationPrompts,
    measure: Objective | None,
) -> list[BenchRow]:
    """Rows of ``results`` (by format) against every quantizer; one line says why there are none."""
    headlines = [line for line in HEADLINES if line[0] in results]
    try:
        ggml = Ggml(library())
    except (SetupError, OSError) as error:
        print(f"llama.cpp's quantizers are left out: {error}", flush=True)
        return [
            BenchRow(_headline(ours, other), f"{ours} calibrated, {other}", None, None, None, "", 0,
                     machine(), bound, skipped=str(error))
            for ours, other, bound in headlines
        ]  # fmt: skip
    found = list(measured(ggml, prompts, measure))
    rows = [
        row for ours, other, bound in headlines for row in _best(results, found, ours, other, bound)
    ]
    for one in found:
        rows += _rows(results, one)
    return rows


@torch.no_grad()
def measured(
    ggml: Ggml, prompts: CalibrationPrompts, measure: Objective | None
) -> Iterator[Measured]:
    subject = TaskSubject(full(CPU))
    chosen = choices(subject.module, Policy("int2"))
    counts = importance(subject, chosen, prompts.calibration)
    reference = final_latents(subject.source, prompts.heldout)
    for setting in settings(ggml):
        print(f"  {setting.name}", flush=True)
        subject = TaskSubject(full(CPU))
        bits, types = quantize(ggml, subject, chosen, counts, setting)
        latents = final_latents(subject.source, prompts.heldout)
        scores = None
        if measure is not None:
            scores = jaq(subject.source, latents, prompts.heldout, measure)
        arm = Arm(distances(latents, reference), details(latents, reference), scores)
        yield Measured(setting, arm, bits, types)


@torch.no_grad()
def importance(
    subject: Subject, names: Collection[str], prompts: PromptSet
) -> dict[str, np.ndarray]:
    """Mean square of each input of the layers, over all steps of the prompts."""
    states, sums, rows = subject.states(prompts, 0, 0), {}, Counter()
    with ExitStack() as hooks:
        for name in names:

            def add(module, arguments, name=name):
                x = arguments[0].flatten(0, -2)
                sums[name] = sums.get(name, 0) + x.double().square().sum(0)
                rows[name] += len(x)

            layer = subject.module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(add).remove)
        for part in states.parts(states.batch):
            states.run(part)
    return {name: (total / rows[name]).float().numpy() for name, total in sums.items()}


@torch.no_grad()
def quantize(
    ggml: Ggml,
    subject: Subject,
    chosen: Mapping[str, Choice],
    counts: Mapping[str, np.ndarray],
    setting: Setting,
) -> tuple[float, Counter[str]]:
    """Round the layers of the subject's module in place; bits a weight, and layers by type."""
    size, weights, types = 0, 0, Counter()
    for name, choice in chosen.items():
        weight = subject.module.get_submodule(name).weight
        kind = setting.type_of(choice, weight.shape[1])
        packed = ggml.quantize(
            weight.float().numpy(), kind, counts[name] if setting.importance else None
        )
        values = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
        weight.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))
        size, weights = size + 8 * packed.nbytes, weights + weight.numel()
        types[kind] += 1
    return size / weights, types


def _headline(ours: str, other: str) -> str:
    return f"bits.{ours}_vs_{other.lower()}"


def _best(results, found: Sequence[Measured], ours: str, other: str, bound: str) -> list[BenchRow]:
    """Against the nearest of a quantizer's settings that take at least as many bits as ours."""
    result = results[ours]
    rivals = [m for m in found if m.setting.quantizer == other and m.bits >= result.bits]
    if not rivals:
        return []
    best = min(rivals, key=lambda m: m.arm.mean)
    near, far = result.proof.calibrated.mean, best.arm.mean
    return [
        BenchRow(_headline(ours, other), f"{_named(ours, result)}, {best}: relative latent distance",
                 near, far, near / far, "", len(best.arm.distance), machine(), bound)
    ]  # fmt: skip


def _rows(results: Mapping[str, WeightsResult], found: Measured) -> list[BenchRow]:
    """A setting beside ours that is nearest at no more bits, or where none is, that of fewest bits."""
    fitting = {k: v for k, v in results.items() if v.bits <= found.bits}
    if fitting:
        name = min(fitting, key=lambda k: fitting[k].proof.calibrated.mean)
    else:
        name = min(results, key=lambda k: results[k].bits)
    result, here = results[name], machine()
    ours, theirs, what = result.proof.calibrated, found.arm, f"{_named(name, result)}, {found}"
    start, n = f"ggml.{found.setting.name}", len(theirs.distance)
    rows = [
        BenchRow(f"{start}.bits", f"{what}: bits a weight",
                 result.bits, found.bits, result.bits / found.bits, "bits", n, here),
        BenchRow(f"{start}.distance", f"{what}: relative latent distance",
                 ours.mean, theirs.mean, ours.mean / theirs.mean, "", n, here),
    ]  # fmt: skip
    if ours.jaq is not None and theirs.jaq is not None:
        low = paired_interval(theirs.jaq, ours.jaq).low
        rows.append(
            BenchRow(f"{start}.jaq", f"{what}: JAQ; the ratio is the lower end of ours less theirs",
                     sum(ours.jaq) / n, sum(theirs.jaq) / n, low, "", n, here)
        )  # fmt: skip
    return rows


def _named(name: str, result: WeightsResult) -> str:
    return f"{name} calibrated ({result.bits:.3f} bits)"
