"""Peak memory of one loading, in a process of its own, watched from outside.

The process reports when it is ready, loads when told, and stays until it was measured.  What is
counted is resident memory, so pages of a memory-mapped file count too.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WAYS = ("ours", "naive", "stock", "stock_fp8")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Peak:
    """Bytes above what the process held before: at most, and once the model was loaded."""

    most: int
    after: int


def unsupported() -> str:
    """Why peaks can't be measured here, "" if they can."""
    if Path("/proc/self/clear_refs").exists():
        return ""
    return "needs Linux's /proc/PID/clear_refs and VmHWM"


def peak_of_load(way: str, path: Path, weight_format: str = "nf4") -> Peak:
    """The memory that loading ``path`` takes in a fresh process (see ``load`` for the ways)."""
    command = [sys.executable, "-m", "benchmarks._memory", way, str(path), weight_format]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            _expect(process, "ready")
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak starts anew
            base = _status(process.pid, "VmRSS")
            _tell(process)
            _expect(process, "loaded")
            most, after = _status(process.pid, "VmHWM"), _status(process.pid, "VmRSS")
            _tell(process)
        finally:
            process.stdin.close()
            if process.wait(timeout=60):
                raise RuntimeError(f"loading with {way} failed: exit status {process.returncode}")
    return Peak(most - base, after - base)


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {name}")


def _expect(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise RuntimeError(f"the process ended before it was {word}")


def _tell(process: subprocess.Popen) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def load(loading, way: str, path: str, weight_format: str):
    """A MODEL from the file.

    "ours" quantizes while it loads; "naive" loads as ComfyUI does and then quantizes; "stock" is
    ComfyUI's loading, "stock_fp8" that with the node's weight_dtype fp8_e4m3fn.
    """
    stock = importlib.import_module("comfy.sd").load_diffusion_model
    torch = importlib.import_module("torch")
    if way == "ours":
        return loading.load_diffusion_model(path, loading.Request(weight_format))
    if way == "naive":
        return loading.quantize_model(stock(path), loading.Request(weight_format))
    return stock(path, {"dtype": torch.float8_e4m3fn} if way == "stock_fp8" else {})


def _serve(way: str, path: str, weight_format: str) -> None:
    loading = importlib.import_module("benchmarks._host").import_pack()
    _say("ready")
    model = load(loading, way, path, weight_format)
    _say("loaded")
    del model


def _say(word: str) -> None:
    os.write(1, f"{word}\n".encode())
    sys.stdin.readline()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
