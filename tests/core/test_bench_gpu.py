"""The GPU benchmark without a GPU: its plan, all its rows at toy size, and what goes wrong in a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import nn

from benchmarks import _gpu_gguf, gpu
from benchmarks._gpu_models import SHAPES, TINY, inputs
from benchmarks._gpu_plan import Bench, Measured, Row, SkipRow
from benchmarks._shapes import LAYERS
from qsched_core import formats
from qsched_core.formats.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
# Of every part of the plan one or two rows.
SOME = (
    "unpack_equal.int2", "product.flux.nf4", "dequantize.int3.torch", "dequantize.gguf_q4_0",
    "step.sdxl.nf4", "step.flux.gguf_q8_0", "speed.int8.1024", "load.int2", "lora.w4a8",
    "offload.8gb.bf16", "offload.8gb.nf4", "batch.sd35", "calibrate.nf4.flux_single", "comfyui.load",
)  # fmt: skip


def command(*options: str, **environment: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | environment
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *options],
        cwd=ROOT, env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip


def run(path: Path, *options: str) -> dict:
    done = command("--tiny", "--json", str(path), *options)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def check(result: dict) -> None:
    """A row has its numbers or its reason; nothing has failed."""
    assert result["status"] in ("done", "skipped"), result
    if result["status"] == "skipped":
        assert result["why"] and result["ours"] is None
    else:
        assert result["ours"] >= 0 and result["unit"]


@pytest.fixture
def main(monkeypatch, capsys):
    """``main(*options)``: the exit status, what it printed, and its errors."""

    def run(*options: str):
        monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", *options])
        status = gpu.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_the_plan_names_each_row_once_and_says_what_it_needs(main):
    rows = gpu.plan()
    assert len({row.id for row in rows}) == len(rows) > 100
    assert all(row.gb > 0 and row.seconds > 0 and row.what for row in rows)
    named = {row.format for row in rows if row.format}
    assert named == set(formats.names())
    status, printed, _ = main("--dry-run")
    assert status == 0 and all(row.id in printed for row in rows)
    assert "GB" in printed and "minutes" in printed


@pytest.mark.parametrize(
    ("memory", "left_out"),
    [(22.8, ()), (11.2, ()), (7.3, ("offload.12gb.",)), (5.2, ("offload.12gb.", "offload.8gb."))],
    ids=lambda value: f"{value} GB" if isinstance(value, float) else "",
)
def test_every_part_has_rows_for_a_small_card(memory, left_out, main):
    """What is free on cards of 24, 12, 8 and 6 GB: five parts of the 8 GB one once had none."""
    _, printed, _ = main("--dry-run", "--memory", str(memory), "--host-memory", "60")
    lines = {line.split()[0]: line for line in printed.splitlines()}
    for row in gpu.plan():
        expected = bool(left_out) and row.id.startswith(left_out)
        assert ("left out: needs" in lines[row.id]) == expected, lines[row.id]


def test_what_waits_on_the_host_must_fit_there(main):
    _, printed, _ = main("--dry-run", "--host-memory", "14", "--only", "offload.")
    found = {line.split()[0]: "of the host's memory" in line for line in printed.splitlines()}
    assert found["offload.8gb.bf16"] and found["offload.12gb.bf16"]
    assert not any(found[f"offload.{size}gb.int2"] for size in (8, 12))


def test_some_of_every_part_runs_in_toy_size(tmp_path):
    found = run(tmp_path / "gpu.json", "--only", *SOME)
    assert found["tiny"] and found["machine"]["torch"] == torch.__version__
    for result in found["rows"]:
        check(result)
    by_id = {result["id"]: result for result in found["rows"]}
    assert len(by_id) >= len(SOME)
    assert "NVIDIA" in by_id["unpack_equal.int2"]["why"]
    assert "needs ComfyUI" in by_id["comfyui.load.nf4"]["why"]
    assert by_id["offload.8gb.nf4"]["ratio"] > 0 and by_id["offload.8gb.nf4"]["other"] > 0


@pytest.mark.full
def test_the_whole_runs_in_toy_size(tmp_path):
    found = run(tmp_path / "gpu.json", "--minutes", "20")
    assert [result["id"] for result in found["rows"]] == [row.id for row in gpu.plan()]
    for result in found["rows"]:
        check(result)
    assert Counter(result["status"] for result in found["rows"])["done"] > 80


@pytest.fixture
def simulated(monkeypatch):
    """As if a GPU were here: see simulated_gpu.py."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here")
    cuda = torch.cuda
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda *_: 10**9)
    monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (80 * 10**9, 80 * 10**9))
    facts = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(cuda, "get_device_properties", lambda *_: facts)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with simulated_gpu() as device:
        yield device


def test_rows_keep_their_tensors_on_the_device(simulated):
    rows = [row for row in gpu.plan() if row.id.startswith(SOME) and not row.id.startswith("comfy")]
    found: list[dict] = []
    gpu.work(Bench(simulated, tiny=True), rows, found.append)
    results = [result for result in found if "begin" not in result]
    assert len(results) == len(rows)
    for result in results:
        check(result)


def row(name: str, do, seconds: float = 0.1, **more) -> Row:
    return Row(name, "a row", 0.1, seconds, do, **more)


def fails(bench):
    raise ValueError("broken")


def test_a_row_that_fails_is_recorded_and_the_rest_goes_on():
    good = Measured(1.0, 2.0, 2.0, "s")
    rows = [
        row("a", fails),
        row("b", lambda bench: good),
        row("c", lambda bench: good, needs=("no_such_package",)),
        row("d", lambda bench: good, format="nvfp4"),
    ]
    found: list[dict] = []
    gpu.work(Bench(torch.device("cpu"), True), rows, found.append)
    results = {r["id"]: r for r in found if "begin" not in r}
    assert results["a"]["status"] == "failed" and "ValueError: broken" in results["a"]["why"]
    assert results["b"]["status"] == "done" and results["b"]["ratio"] == 2.0
    assert results["c"]["status"] == "skipped" and "no_such_package" in results["c"]["why"]
    assert "sm_100" in results["d"]["why"] or "comfy_kitchen" in results["d"]["why"]


def test_what_a_row_held_that_ran_out_of_memory_is_free_for_the_next():
    held = []

    def greedy(bench):
        model = nn.Linear(4, 4)
        held.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def next_one(bench):
        return Measured(float(held[0]() is not None), None, None, "models")

    found: list[dict] = []
    gpu.work(Bench(torch.device("cpu"), True), [row("a", greedy), row("b", next_one)], found.append)
    first, second = (result for result in found if "begin" not in result)
    assert first["status"] == "failed" and "out of memory" in first["why"]
    assert second["status"] == "done" and second["ours"] == 0


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """``watched(code, rows, seconds)``: what a watch writes whose worker is ``code``."""

    def run(code: str, rows: list[Row], seconds: float = 60.0) -> list[dict]:
        script = tmp_path / "worker.py"
        head = "import json, os, sys, time\nids = sys.argv[sys.argv.index('--worker') + 1].split(',')\n"
        say = "def say(value): print(json.dumps(value), flush=True)\n"
        script.write_text(head + say + code, encoding="utf-8")
        popen = subprocess.Popen

        def started(arguments, **options):
            return popen([sys.executable, str(script), *arguments[3:]], **options)

        monkeypatch.setattr(gpu.subprocess, "Popen", started)
        monkeypatch.setattr(gpu, "START_SECONDS", 0)
        watch = gpu.Watch(tmp_path / "gpu.json", seconds, torch.device("cpu"), False)
        watch.run(rows)
        written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
        assert written == watch.found
        return written

    return run


DONE = """
def done(name):
    say(dict(id=name, what='', status='done', why='', ours=1.0, other=None, ratio=None, unit='s', n=1))
for name in ids:
    say(dict(begin=name))
"""


def test_a_row_that_takes_its_process_down_is_recorded_and_the_rest_goes_on(watched):
    code = (
        DONE
        + "    if name == 'b':\n        print('bad access', file=sys.stderr)\n        os._exit(9)\n    done(name)\n"
    )
    found = watched(code, [row(name, fails) for name in "abcd"])
    assert [r["id"] for r in found] == ["a", "b", "c", "d"]
    assert [r["status"] for r in found] == ["done", "failed", "done", "done"]
    assert "exit status 9" in found[1]["why"] and "bad access" in found[1]["why"]


def test_a_row_that_hangs_is_given_up(watched, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", -290)  # 30 s of grace less 29
    code = DONE + "    if name == 'b':\n        time.sleep(600)\n    done(name)\n"
    began = time.monotonic()
    found = watched(code, [row(name, fails) for name in "abc"])
    assert [r["status"] for r in found] == ["done", "failed", "done"]
    assert "hung" in found[1]["why"] and time.monotonic() - began < 60


def test_rows_that_no_longer_fit_are_left_out(watched):
    code = DONE + "    time.sleep(0.7)\n    done(name)\n"
    rows = [
        row("a", fails, 0.5),
        row("long", fails, 600.0),
        row("b", fails, 0.5),
        row("c", fails, 2.0),
    ]
    found = watched(code, rows, seconds=2.5)
    status = {r["id"]: r["status"] for r in found}
    assert status["a"] == "done" and status["long"] == status["c"] == "left out"
    assert len(status) == 4 and all(r["why"] for r in found if r["status"] == "left out")


def test_wheels_of_missing_packages_are_unpacked_for_the_run(tmp_path):
    folder, target = tmp_path / "wheels", tmp_path / "target"
    folder.mkdir()
    for name in ("qsched_no_such", "torch"):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            facts = f"{name}-1.0.dist-info"
            wheel.writestr(f"{name}.py", "VALUE = 7\n")
            wheel.writestr(
                f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{facts}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(
                f"{facts}/RECORD",
                f"{name}.py,,\n{facts}/METADATA,,\n{facts}/WHEEL,,\n{facts}/RECORD,,\n",
            )
    assert gpu.unpack_wheels(folder, target) == ["qsched-no-such"]
    assert (target / "qsched_no_such.py").read_text() == "VALUE = 7\n"
    assert not (target / "torch.py").exists()


def test_without_a_gpu_the_real_run_says_so(tmp_path, main):
    status, _, errors = main("--json", str(tmp_path / "gpu.json"))
    assert status == 1 and "--tiny" in errors
    assert not (tmp_path / "gpu.json").exists()
    status, _, errors = main("--tiny", "--wheels", str(tmp_path / "none"))
    assert status == 1 and "is no folder" in errors


@pytest.mark.parametrize("name", SHAPES)
def test_the_models_have_the_published_layers(name):
    """Exactly for FLUX and SDXL; SD3.5's last block is whole here, where the published one is not."""
    policy = Policy("int2")
    with torch.device("meta"):
        model = SHAPES[name].make(1.0)
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv2d"}
    found = Counter(
        tuple(layer.weight.shape)
        for key, layer in model.named_modules()
        if type(layer) in kinds
        and policy(key, tuple(layer.weight.shape), kinds[type(layer)]).format is not None
    )
    if name == "sd35":
        assert set(found) == set(LAYERS[name]) - {(4864, 2432)}
        assert all(abs(found[shape] - LAYERS[name][shape]) <= 1 for shape in found)
    else:
        assert found == LAYERS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(
        SHAPES[name].weights, rel=0.03
    )
    tiny = TINY[name]
    out = tiny.make(1.0)(*inputs(tiny, "cpu", torch.float32))
    assert out.shape == tiny.inputs[0] and torch.isfinite(out).all()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_ggufs_arithmetic_is_that_of_its_library(kind):
    quants = pytest.importorskip("gguf.quants")
    types = pytest.importorskip("gguf").GGMLQuantizationType
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    data = _gpu_gguf.quantize(weight, kind)
    theirs = quants.quantize(weight.numpy(), types[kind.upper()])
    assert (data.numpy().reshape(8, -1) == theirs).mean() > 0.99  # but for ties
    found = _gpu_gguf.dequantize(data, kind, (8, 96), torch.float32)
    wanted = quants.dequantize(data.numpy().reshape(8, -1), types[kind.upper()])
    torch.testing.assert_close(found, torch.from_numpy(wanted))


def test_a_skipped_row_is_no_error():
    def skip(bench):
        raise SkipRow("not here")

    found: list[dict] = []
    gpu.work(Bench(torch.device("cpu"), True), [row("a", skip)], found.append)
    assert found[1]["status"] == "skipped" and found[1]["why"] == "not here"
