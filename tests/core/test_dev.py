"""dev.py: its commands, and that each failure is one line with its fix."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.console import explain, run_stage
from devtools.imports import imports_of
from devtools.server import PACK_ROOT, ComfyServer, ServerError, link_pack

ROOT = Path(__file__).resolve().parents[2]


def _dev(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _one_line(answer: subprocess.CompletedProcess) -> str:
    assert answer.returncode == 1, answer.stdout + answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_broken_comfyui_path_is_named(tmp_path):
    line = _one_line(_dev("test", COMFYUI_PATH=str(tmp_path)))
    assert f"COMFYUI_PATH={tmp_path}" in line
    assert "main.py" in line


def test_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in _one_line(_dev("serve", "--port", str(port)))


def test_unknown_benchmark_lists_those_there_are():
    line = _one_line(_dev("bench", "no-such-benchmark"))
    assert "no-such-benchmark" in line
    for path in (ROOT / "benchmarks").glob("[!_]*.py"):
        assert path.stem in line


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("failed to write: There is not enough space on the disk. (os error 112)", "disk is full"),
        ("Failed to establish a new connection: [Errno 111]", "check the network"),
        ("dns error: failed to lookup address information", "check the network"),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)", "PIP_CERT"),
        ("PermissionError: [Errno 13] Permission denied: 'x'", "permission denied"),
        ("one\nERROR: something new\n\n", "ERROR: something new"),
        ("", "setup.log"),
    ],
)
def test_failures_are_explained_in_one_line(output, fix):
    line = explain(output, Path("setup.log"))
    assert fix in line
    assert "\n" not in line


def test_stage_shows_its_seconds_and_keeps_its_output(tmp_path, capsys):
    log = tmp_path / "log"
    good = run_stage("good", [sys.executable, "-c", "print('fine')"], log, dict(os.environ))
    bad = run_stage("bad", [sys.executable, "-c", "raise SystemExit('no')"], log, dict(os.environ))
    assert good is None
    assert bad.strip() == "no"
    assert "fine" in log.read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("s (failed)")


def test_pack_is_linked_once_and_never_over_something_else(tmp_path):
    link = link_pack(tmp_path)
    assert link.resolve() == PACK_ROOT
    assert link_pack(tmp_path) == link
    foreign = tmp_path / "other" / "custom_nodes" / link.name
    foreign.mkdir(parents=True)
    with pytest.raises(ServerError, match="not this pack"):
        link_pack(tmp_path / "other")


def test_two_servers_get_two_ports(tmp_path):
    servers = [ComfyServer(tmp_path, tmp_path) for _ in range(2)]
    assert servers[0].port != servers[1].port


def test_serve_lists_the_demos_workflow_and_keeps_a_changed_one(tmp_path):
    from devtools.serve import WORKFLOW, show_workflow

    show_workflow(PACK_ROOT / WORKFLOW, tmp_path)
    listed = tmp_path / "user" / "default" / "workflows" / WORKFLOW.name
    assert listed.read_bytes() == (PACK_ROOT / WORKFLOW).read_bytes()
    listed.write_text("changed")
    show_workflow(PACK_ROOT / WORKFLOW, tmp_path)
    assert listed.read_text() == "changed"


def test_serve_offers_the_users_own_models(tmp_path):
    from devtools.serve import model_paths

    for name in ("checkpoints", "loras", "configs"):
        (tmp_path / "models" / name).mkdir(parents=True)
    entry = json.loads(model_paths(tmp_path))["own"]
    assert entry == {
        "base_path": str(tmp_path / "models"),
        "checkpoints": "checkpoints",
        "loras": "loras",
    }


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_of_pytest_pass_through_in_order(dev):
    options, more = dev.arguments(["test", "-k", "ramp and not slow", "-x", "tests/core"])
    assert options.command == "test"
    assert more == ["-k", "ramp and not slow", "-x", "tests/core"]
    options, more = dev.arguments(["demo", "--out", "here", "--seed", "3"])
    assert options.out == Path("here")
    assert more == ["--seed", "3"]
    options, more = dev.arguments(
        ["--python", "3.12", "--with", "a==1", "--with", "b", "test", "-x"]
    )
    assert (options.python, options.packages, more) == ("3.12", ["a==1", "b"], ["-x"])
    options, more = dev.arguments(["test", "--with", "c"])
    assert (options.packages, more) == ([], ["--with", "c"])


def test_what_a_module_imported_is_read_from_pythons_own_log():
    """A line stands after the lines of what the module imported; other output is between them."""
    log = "\n".join(
        [
            "import time: self [us] | cumulative | imported package",
            "import time:        10 |         10 | comfy.sd",
            "a line of ComfyUI's",
            "import time:       100 |        100 |     sqlalchemy",
            "import time:       200 |        300 |   optuna",
            "import time:        50 |        350 | /base/custom_nodes/Pack.nodes.calibration",
            "import time:         5 |          5 | Pack.nodes.late",
        ]
    )
    first, last = imports_of(log, "Pack")
    assert [module.name.split("/")[-1] for module in first.all()] == [
        "Pack.nodes.calibration",
        "optuna",
        "sqlalchemy",
    ]
    assert first.seconds == pytest.approx(350e-6)
    assert last.children == ()


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ([], True),
        (["--full"], True),
        (["--full", "--durations=30"], True),
        (["-x"], False),
        (["tests/core/test_dev.py"], False),
        (["--full", "-k", "nf4"], False),
        (["-n", "4"], False),
    ],
)
def test_the_whole_suite_runs_in_two_lanes(dev, given, both):
    class Asked:
        def run(self, *arguments):
            self.arguments = arguments
            return 5

    asked = Asked()
    options, more = dev.arguments(["test", *given])
    assert dev.COMMANDS["test"](asked, options, more) == 5
    assert asked.arguments[-len(given) or len(asked.arguments) :] == tuple(given)
    assert (asked.arguments[2:4] == ("-n", "2")) == both
