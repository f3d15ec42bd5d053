"""Everything that needs no GPU can be imported where there is no POSIX, as on Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What Python for Windows lacks.
POSIX = ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("qsched_core", "devtools", "demo", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
NEED_COMFYUI = ("benchmarks._reliability.jobs",)  # it imports the host when it is imported
SCRIPT = """
import importlib, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {posix!r}:
            raise ImportError(f"there is no {{name}} on Windows")

for name in {posix!r}:
    sys.modules.pop(name, None)
import torch, optuna, filelock, open_clip, safetensors.torch, bitsandbytes, sqlalchemy, psutil
import transformers, scipy  # they have their own ways on each system
for name in {posix!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
for name in ("fork", "geteuid", "getuid", "getpgid", "mkfifo", "statvfs", "sysconf", "uname"):
    if hasattr(os, name):
        delattr(os, name)
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{{name}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(failed))
"""


def test_every_module_is_imported_without_posix():
    modules = [
        name for name in MODULES if name not in NEED_COMFYUI and not name.endswith("__main__")
    ]
    script = SCRIPT.format(posix=POSIX, modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("word", POSIX)
def test_no_source_imports_what_one_system_alone_has(word):
    for path in ROOT.joinpath("qsched_core").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"import {word}\n" not in text and f"from {word} " not in text, path
    for path in ROOT.joinpath("nodes").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"import {word}\n" not in text and f"from {word} " not in text, path
