"""Weights rounded for their inputs, beside the same formats' plain rounding, on the demo model.

64 captions calibrate (four steps each), 256 others judge: neither the demo's own nor each other's.
``calibrated.FORMAT.distance``: relative latent distance to the unquantized model, calibrated and
plain; the ratio is of the two.  ``calibrated.FORMAT.change``: ends of the paired 95 % interval of the
distances' difference, over plain's mean; below 0 is nearer.  ``calibrated.FORMAT.jaq`` (not with ``--no-jaq``):
held-out JAQ of both; the ratio is the lower end of the interval of the gain.  ``calibrated.FORMAT.bits``: bits a
weight as stored, of all quantized layers; plain rounding keeps modulation layers at 4 bits.
``calibrated.FORMAT.step``: a step's time, calibrated and the same formats plainly rounded, in turn.
``calibrate.FORMAT.seconds``: the walk, on one thread.

Then llama.cpp's own quantizers on the same prompts (not with ``--no-ggml``), with an importance matrix and
without.  ``bits.int2_vs_iq2_s`` and ``bits.int3_vs_q4_k``: our calibrated distance over theirs, at no
more bits.  ``ggml.QUANTIZER[.imatrix][.all].bits``, ``.distance``, ``.jaq``: each beside the
calibrated format of this run that is nearest at no more bits, or the smallest where none has so few.

``calibrated.mixed.distance`` (not with ``--no-mixed``): formats by layer at 3 bits a weight over all
quantized layers, modulation among them, and the straight line (log distance over bits) between
int2 and int3 for every layer; all three calibrated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from demo.build import weights_dir
from demo.prompts import demo_prompts
from demo.shapes import sample_scenes
from demo.task import full, make
from qsched_core.formats.policy import Policy
from qsched_core.objective import Objective
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import (
    RoundedWeights,
    TaskSubject,
    WeightsResult,
    calibrate_weights,
    rounded_plainly,
)
from qsched_core.rounding.walk import parameters_in
from qsched_core.scorers.open_clip import load_file

from ._common import BenchRow, machine, report, timings
from ._llama_cpp import compare
from ._mixed import mixed_rows

FORMATS = ("int2", "int3", "nf4", "fp4", "w4a8", "w4a4", "svdquant_w4a4", "int8", "int8_convrot")
BOUNDS = {
    "int2": "<= 0.12", "int3": "<= 0.18", "nf4": "<= 0.18",
    "w4a8": "<= 0.25", "w4a4": "<= 0.45", "svdquant_w4a4": "<= 0.55",
}  # fmt: skip
SECONDS = 60.0  # what the demo model may take
BUILDS, STEPS, BATCH = 8, 15, 4  # models that are built, steps timed of each, latents in a step
SCENES, SEED = 2500, 20251126


def captions(calibration: int, heldout: int) -> CalibrationPrompts:
    """Captions of scenes that no training picture showed, none of them the demo's own."""
    random, own = np.random.default_rng(SEED), demo_prompts()
    used = {*own.calibration, *own.heldout, *own.test}
    drawn = dict.fromkeys(s.caption() for s in sample_scenes(SCENES, random, held_out=True))
    free = [caption for caption in drawn if caption not in used]
    free = [free[i] for i in random.permutation(len(free))]
    return CalibrationPrompts.of(
        free[:calibration], free[calibration : calibration + heldout], SEED
    )


def rows_of(name: str, result: WeightsResult, seconds: float) -> list[BenchRow]:
    proof, here = result.proof, machine()
    plain, found, n = proof.plain.mean, proof.calibrated.mean, len(proof.plain.distance)
    change, bits = proof.change, result.bits

    def row(kind, what, ours, other, ratio, unit, bound=""):
        return BenchRow(kind, f"{name}: {what}", ours, other, ratio, unit, n, here, bound)

    rows = [
        row(
            f"calibrated.{name}.distance", "relative latent distance, calibrated and plain",
            found, plain, found / plain, "", BOUNDS.get(name, ""),
        ),
        row(
            f"calibrated.{name}.change", "ends of the interval of the distance's change",
            change.low, change.high, change.high / plain, "", "<= 0",
        ),
        row(
            f"calibrated.{name}.bits", "bits a weight, calibrated and plain",
            bits, result.plain_bits, bits / result.plain_bits, "bits", "<= 1",
        ),
        row(
            f"calibrate.{name}.seconds", f"the walk, against {SECONDS:.0f} s",
            seconds, SECONDS, seconds / SECONDS, "s CPU", "<= 1",
        ),
    ]  # fmt: skip
    if proof.gain is not None:
        jaq = proof.to_dict()["jaq"]
        rows.append(
            row(
                f"calibrated.{name}.jaq",
                f"JAQ, calibrated and plain (unquantized {jaq['unquantized']:.3f})",
                jaq["calibrated"],
                jaq["plain"],
                proof.gain.low,
                "",
                ">= 1.1" if name == "int2" else "",
            )
        )
    return rows


@torch.no_grad()
def step_row(name: str, result: WeightsResult, prompts: CalibrationPrompts) -> BenchRow:
    """A step of the calibrated model beside one of the same formats rounded plainly, in turn.

    Both are built anew several times: where a model lies in memory alone is worth 2 % of a step.
    """
    part, weights = prompts.heldout.part(0, BATCH), result.weights

    def step_of(task):
        x, extra = task.initial(part.seeds), task.condition(part.prompts)
        sigma = torch.full((len(x),), 0.75)
        return lambda: task.denoise(x, sigma, **extra)

    cpu = torch.device("cpu")
    plainly = rounded_plainly(weights.chosen, partial(parameters_in, full(cpu).module))
    both = (weights, RoundedWeights(plainly, weights.chosen, weights.provenance))
    ours, other = [], []
    for build in range(BUILDS):
        order = both if build % 2 else both[::-1]
        steps = [step_of(make(name, cpu, rounded=found)) for found in order]
        times = timings(*(steps if build % 2 else steps[::-1]), STEPS)
        ours += times[0]
        other += times[1]
    ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
    return BenchRow(
        f"calibrated.{name}.step", f"{name}: a step of {BATCH} latents, calibrated and plain; the ratio is the median of pairs",
        statistics.median(ours), statistics.median(other), ratio, "s", len(ours), machine(), "<= 1.01",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--only", nargs="+", choices=FORMATS, default=[n for n in FORMATS if n in BOUNDS]
    )
    parser.add_argument("--prompts", type=int, default=64, help="that calibrate")
    parser.add_argument("--heldout", type=int, default=256)
    parser.add_argument("--jaq", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ggml", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = captions(options.prompts, options.heldout)
    measure = Objective(load_file(weights_dir() / "scorer.safetensors")) if options.jaq else None
    rows: list[BenchRow] = []
    results: dict[str, WeightsResult] = {}
    for name in options.only:
        spent = [time.process_time()]

        def done(block, spent=spent):
            spent.append(time.process_time())
            print(f"  block {block.index + 1} of {block.total}", flush=True)

        with tempfile.TemporaryDirectory() as folder:
            result = results[name] = calibrate_weights(
                TaskSubject(full(torch.device("cpu"))), prompts, Policy(name), Path(folder),
                measure=measure, on_block=done,
            )  # fmt: skip
        rows += rows_of(name, result, spent[-1] - spent[0])
        rows.append(step_row(name, result, prompts))
        report(rows, options.json)
    if options.ggml:
        rows += compare(results, prompts, measure)
        report(rows, options.json)
    if options.mixed:
        rows += mixed_rows(prompts)
        report(rows, options.json)


if __name__ == "__main__":
    main()
