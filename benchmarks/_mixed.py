"""Formats by layer for 3 bits a weight, beside the straight line between uniform int2 and int3."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from demo.task import full
from qsched_core.formats.policy import Policy
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import Budget, TaskSubject, calibrate_to_size, sized_report

from ._common import BenchRow, machine

BITS, BOUND = 3.0, "<= 0.6"


def mixed_rows(prompts: CalibrationPrompts) -> list[BenchRow]:
    """``calibrated.mixed.*``, see :mod:`benchmarks.bits`."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = calibrate_to_size(
            TaskSubject(full(torch.device("cpu"))), prompts, Policy("int2"), Path(folder),
            Budget(bits=BITS, ladder=("int2", "int3", "nf4", "int8")),
        )  # fmt: skip
    print(sized_report(found), flush=True)
    seconds, here, n = time.process_time() - began, machine(), len(prompts.heldout)
    mix, line = found.mixed, found.line
    ends = " and ".join(f"{p.format} {p.distance:.5f} at {p.bits:.2f}" for p in found.uniform)
    return [
        BenchRow(
            "calibrated.mixed.distance", f"at {mix.bits:.3f} bits, and the line through {ends}",
            mix.distance, line, mix.distance / line, "", n, here, BOUND,
        ),
        BenchRow(
            "calibrated.mixed.bits", "bits a weight of all quantized layers, and the target",
            mix.bits, BITS, mix.bits / BITS, "bits", 1, here, "<= 1",
        ),
        BenchRow(
            "calibrated.mixed.seconds", "weighing the layers, of all with three walks and proofs",
            found.seconds, seconds, found.seconds / seconds, "s", 1, here,
        ),
    ]  # fmt: skip
