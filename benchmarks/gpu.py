"""What quantized models are worth on this GPU: everything that can be measured in ten minutes.

    python dev.py bench gpu --json gpu.json --minutes 10

and on a machine without a network, where Python and torch with CUDA are all there is:

    python -m benchmarks.gpu --json gpu.json --minutes 10 [--wheels DIR]

in the folder of this repository.  ``--wheels`` is a folder of wheels (bitsandbytes, comfy-kitchen,
optuna and what it needs, ...): those whose package is missing are unpacked for this run alone.  Rows
that need a package or ComfyUI which is not there say so.  ``--dry-run`` prints the plan, ``--tiny``
runs all of it with toy sizes, on a CPU too.

Each row is in the JSON file as soon as it is known: ``status`` is "done", "skipped" (it can't run
here, and why), "failed" (its error; the others go on) or "left out" (the time was up).  Rows run in a
process of their own, which is started anew if one of them takes it down or hangs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from qsched_core.files import write_atomic
from qsched_core.optional import MissingDependencyError

from . import _gpu_comfy, _gpu_layers, _gpu_steps
from ._gpu_plan import Bench, Measured, Row, SkipRow

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 15  # of a new process, until its first row begins
PATIENCE = 6  # times its estimate (and half a minute) that a row may take before it counts as hung
GROUPS = (
    _gpu_layers.correctness, _gpu_layers.bandwidth, _gpu_steps.steps, _gpu_layers.integer_speed,
    _gpu_steps.files, _gpu_layers.loras, _gpu_steps.offloading, _gpu_layers.rounding,
    _gpu_steps.batch_sizes, _gpu_comfy.rows,
)  # fmt: skip


def plan() -> list[Row]:
    """Every row, in the order in which they run."""
    return [row for group in GROUPS for row in group()]


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    found = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    for package in ("triton", "bitsandbytes", "comfy-kitchen"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "device": facts.name,
            "capability": f"sm_{facts.major}{facts.minor}",
            "memory_gb": facts.total_memory / 1e9,
            "processors": facts.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def record(row: Row, status: str, why: str = "", found: Measured | None = None, **more) -> dict:
    """A row as the file has it."""
    numbers = asdict(found or Measured(None, None, None, "", 0))
    return {"id": row.id, "what": row.what, "status": status, "why": why, **numbers, **more}


# The process that measures.


def work(bench: Bench, rows: list[Row], say) -> None:
    """Run rows, one after the other; what can go wrong in one stays in it."""
    for row in rows:
        say({"begin": row.id})
        started = time.perf_counter()
        try:
            bench.check(row)
            bench.clear()
            result = record(row, "done", found=row.run(bench))
        except (SkipRow, MissingDependencyError) as reason:
            result = record(row, "skipped", str(reason))
        except Exception as error:  # whatever it was, the next row is another matter
            traceback.print_exc()
            result = record(row, "failed", f"{type(error).__name__}: {error}"[:2000])
        result["seconds"] = round(time.perf_counter() - started, 3)
        say(result)
        if result["status"] == "failed" and _is_broken(bench):
            return


def _is_broken(bench: Bench) -> bool:
    """Whether the device refuses all work of this process from now on."""
    try:
        torch.zeros(1, device=bench.device).add_(1).item()
    except RuntimeError:
        return True
    return False


def worker(ids: list[str], device: torch.device, tiny: bool) -> None:
    # Rows go to what is standard output now; whatever else writes there goes to the errors.
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: dict) -> None:
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    known = {row.id: row for row in plan()}
    work(Bench(device, tiny), [known[name] for name in ids], say)


# The process that watches.


class Watch:
    """Gives rows to workers, keeps the time, and writes the file after each row."""

    def __init__(self, path: Path | None, seconds: float, device: torch.device, tiny: bool):
        self.path, self.device, self.tiny = path, device, tiny
        self.began, self.until = time.monotonic(), time.monotonic() + seconds
        self.found: list[dict] = []
        self.environment = dict(os.environ)
        self.machine = machine(device)

    def take(self, result: dict) -> None:
        self.found.append(result)
        numbers = ""
        if result["ours"] is not None:
            numbers = f" ours {result['ours']:.4g} {result['unit']}"
        if result["other"] is not None:
            numbers += f", other {result['other']:.4g}"
        if result["ratio"] is not None:
            numbers += f", ratio {result['ratio']:.3f}"
        print(f"{result['id']:32} {result['status']:9}{numbers} {result['why'][:160]}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            content = {
                "machine": self.machine,
                "tiny": self.tiny,
                "seconds": round(time.monotonic() - self.began, 1),
                "rows": self.found,
            }
            write_atomic(self.path, json.dumps(content, indent=1))

    def left(self) -> float:
        return self.until - time.monotonic()

    def run(self, rows: list[Row]) -> None:
        waiting = list(rows)
        while waiting:
            fits = self._fitting(waiting)
            if not fits:
                break
            waiting = self._one_worker(waiting, fits)

    def _fitting(self, waiting: list[Row]) -> list[Row]:
        """The rows for one worker: those that fit into the time one by one, in order."""
        room, fits = self.left() - START_SECONDS, []
        for row in waiting:
            if row.seconds <= room:
                fits.append(row)
                room -= 0 if self.tiny else row.seconds
        for row in waiting if not fits else ():
            self.take(
                record(row, "left out", f"takes about {row.seconds:.0f} s more than there were")
            )
        return fits

    def _one_worker(self, waiting: list[Row], rows: list[Row]) -> list[Row]:
        """Run rows until they are done, the worker is gone or the time is up; what is waiting then."""
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--device", str(self.device), "--worker",
            ",".join(row.id for row in rows), *(["--tiny"] if self.tiny else []),
        ]  # fmt: skip
        known, done, now = {row.id: row for row in rows}, set(), None
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=errors,
                text=True, encoding="utf-8",
            )  # fmt: skip
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            limit, why = 120.0, ""
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    why = f"hung: no answer within {limit:.0f} s"
                    break
                if line is None:
                    break
                value = json.loads(line)
                if "begin" in value:
                    now = known[value["begin"]]
                    if now.seconds > self.left():
                        now = None
                        break
                    limit = min(PATIENCE * now.seconds + 30, max(10.0, self.left() + 30))
                    continue
                self.take(value)
                done.add(value["id"])
                now, limit = None, 120.0
            process.kill()
            process.wait()
            if now is not None:
                errors.seek(0)
                last = errors.read()[-1500:]
                why = why or f"took its process down (exit status {process.returncode})"
                self.take(record(now, "failed", f"{why}\n{last}", seconds=None))
                done.add(now.id)
        if not done:  # not one row: starting again would not help
            for row in waiting:
                self.take(record(row, "left out", why or "the time was up"))
            return []
        return [row for row in waiting if row.id not in done]


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Install the wheels of packages that are missing into ``target``; the names of those."""
    names = {}
    for wheel in sorted(folder.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            names[name] = str(wheel)
    if names:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
        subprocess.run([*command, "--target", str(target), *names.values()], check=True)
    return sorted(names)


def print_plan(rows: list[Row], memory: float | None, host: float | None) -> None:
    """The rows and what they need; with GB that are free on the device and host, which don't fit."""
    fit = []
    for row in rows:
        needs = f"  needs {', '.join(row.needs)}" if row.needs else ""
        reason = row.too_large(math.inf if memory is None else 1e9 * memory, host and 1e9 * host)
        print(
            f"{row.id:32} {row.gb:6.1f} GB {row.seconds:5.0f} s  {row.what}{needs}"
            + (f"  left out: {reason}" if reason else "")
        )
        fit += [] if reason else [row]
    total = sum(row.seconds for row in fit)
    print(f"{len(fit)} rows, about {total / 60:.0f} minutes where every one can run")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose id begins so")
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes, to try the benchmark itself"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--memory", type=float, help="with --dry-run: GB that a card has free")
    parser.add_argument(
        "--host-memory", type=float, help="with --dry-run: GB that the host has free"
    )
    parser.add_argument(
        "--wheels", type=Path, help="a folder of wheels of packages that may be missing"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = options()
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # some of torch's functions want a number
    if args.worker:
        worker(args.worker.split(","), device, args.tiny)
        return 0
    rows = [row for row in plan() if row.id.startswith(tuple(args.only))]
    if args.dry_run:
        print_plan(rows, args.memory, args.host_memory)
        return 0
    if device.type == "cpu" and not args.tiny:
        print("torch sees no CUDA device; --tiny tries the benchmark on a CPU", file=sys.stderr)
        return 1
    if args.wheels is not None and not args.wheels.is_dir():
        print(f"--wheels {args.wheels} is no folder", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="qsched-wheels-") as target:
        watch = Watch(args.json, 60 * args.minutes, device, args.tiny)
        if args.wheels is not None:
            watch.machine["from_wheels"] = unpack_wheels(args.wheels, Path(target))
            old = os.environ.get("PYTHONPATH")
            watch.environment["PYTHONPATH"] = os.pathsep.join([target, *([old] if old else [])])
        watch.run(rows)
    failed = [result["id"] for result in watch.found if result["status"] == "failed"]
    print(f"{len(watch.found)} rows, {len(failed)} failed" + "".join(f"\n  {i}" for i in failed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
