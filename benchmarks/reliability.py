"""The attacks that this pack was hardened against, for anyone to repeat.

``reliability.kills``: work killed at random moments and begun again; lost is at most the running unit,
the result is the uninterrupted one's, nothing is left behind.  ``reliability.mutants``: damaged files and
texts of every kind that is read; each is refused as documented, or read as what it says, within 2 s of
CPU.  ``reliability.workflows``: the same with workflows posted to a real server.  ``reliability.soak``:
the slope of a real server's memory over many prompts.  ``reliability.servers``: two servers on one
folder and one database.  ``reliability.disk``: a disk that is full at some point.

A row's ratio is the share of cases that failed (soak: the slope over its limit).  Each failure is
written to ``--failures`` as a file; ``--rerun FILE`` tries that case again.  ``--minutes`` makes all of
it smaller.  The seed is printed; the same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from ._common import BenchRow, machine, report
from ._reliability.cases import Failure, Outcome, Setting, keep

# cases of a whole run
SIZES = {
    "kills": 42, "mutants": 200_000, "workflows": 600, "soak": 300, "servers": 12, "disk": 200,
}  # fmt: skip
LEAST = {"kills": 4, "mutants": 1000, "workflows": 20, "soak": 20, "servers": 2, "disk": 10}
MINUTES = 60.0  # that a whole run takes on two quiet cores


def attack_of(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks._reliability.{name}")


def size_of(name: str, minutes: float) -> int:
    """Cases of an attack in a run of so many minutes."""
    return max(LEAST[name], round(SIZES[name] * min(1.0, minutes / MINUTES)))


def row_of(name: str, outcome: Outcome) -> BenchRow:
    row_id, here = f"reliability.{name}", machine()
    if outcome.skipped:
        return BenchRow(
            row_id, outcome.note, None, None, None, outcome.unit, 0, here, "<= 0", outcome.skipped
        )
    if outcome.figure is not None:
        ratio = outcome.figure / outcome.limit
        return BenchRow(
            row_id, outcome.note, outcome.figure, outcome.limit, ratio, outcome.unit,
            outcome.cases, here, "<= 1",
        )  # fmt: skip
    failed = len(outcome.failures)
    return BenchRow(
        row_id, outcome.note, failed, 0, failed / max(1, outcome.cases), outcome.unit, outcome.cases,
        here, "<= 0",
    )  # fmt: skip


def rerun(path: Path) -> int:
    failure = Failure.load(path)
    print(f"{failure.attack} {dict(failure.case)}\n  then: {failure.problem}")
    problem = attack_of(failure.attack).again(failure)
    print(f"  now:  {problem or 'no failure'}")
    return int(bool(problem))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument(
        "--seed", type=int, default=None, help="default: a new one, which is printed"
    )
    parser.add_argument("--only", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--failures", type=Path, default=Path("output/reliability"))
    parser.add_argument("--rerun", type=Path, metavar="FILE", help="a file of --failures")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if chosen.rerun:
        return rerun(chosen.rerun)
    seed = random.SystemRandom().randrange(2**31) if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as work:
        for name in chosen.only:
            print(f"{name}:", flush=True)
            setting = Setting(size_of(name, chosen.minutes), seed, Path(work), _tell)
            outcome = attack_of(name).run(setting)
            rows.append(row_of(name, outcome))
            for path in keep(outcome.failures, chosen.failures):
                print(f"  failure: --rerun {path}")
            failed += len(outcome.failures)
            report(rows, chosen.json)
    return int(bool(failed))


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
