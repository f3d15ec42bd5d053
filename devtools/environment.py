"""The project's own virtual environment and its ComfyUI, made when missing, reused when right."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .console import SetupError, explain, note, run_stage
from .host import COMFYUI_VERSION, check_comfyui, comfyui_version, install_comfyui

PYTHON_OLDEST, PYTHON_NEWEST = (3, 10), (3, 14)
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = (
    "pytest", "pytest-xdist", "pytest-timeout", "filelock", "hypothesis", "ruff", "gguf",
    "psycopg[binary]", "playwright",
)  # fmt: skip
# What a fresh environment takes; on Linux torch comes with CUDA's libraries.
DISK_GB = 8 if sys.platform == "linux" else 3
# Every package that something here imports at once; a damaged installation fails on one of them.
IMPORTS = "torch, torchvision, torchaudio, aiohttp.web, av, safetensors.torch, transformers, pytest"


def check_python(version: tuple[int, ...]) -> None:
    """SetupError if torch and ComfyUI have no packages for this Python ``version``."""
    if not PYTHON_OLDEST <= tuple(version[:2]) <= PYTHON_NEWEST:
        oldest, newest = (".".join(map(str, v)) for v in (PYTHON_OLDEST, PYTHON_NEWEST))
        found = ".".join(map(str, version[:2]))
        raise SetupError(
            f"Python {found} is not supported; run this with Python {oldest} to {newest}, "
            "for example: python3.12 dev.py ..."
        )


def interpreter(named: str) -> tuple[str, str]:
    """The program and the version ("3.12.1") of the Python ``named``: a version as "3.12", or a path.

    SetupError if there is none, or if it is one that is not supported.
    """
    is_version = re.fullmatch(r"\d+\.\d+", named)
    program = shutil.which(f"python{named}" if is_version else named)
    found = version_of(program) if program else None
    if found is None:
        raise SetupError(
            f"--python {named}: no such Python runs here; install it, or give its program's path"
        )
    check_python(tuple(int(n) for n in found.split(".")))
    return program, found


def version_of(program: str) -> str | None:
    """The version of a Python as "3.12.1"; None if it does not run."""
    script = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        answer = subprocess.run([program, "-c", script], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def uv_variables(pip: dict[str, str]) -> dict[str, str]:
    """uv's settings that say what pip's environment variables say; uv's own, where set, win."""
    names = {
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_FIND_LINKS": "UV_FIND_LINKS",
        "PIP_NO_INDEX": "UV_NO_INDEX",
        "PIP_TRUSTED_HOST": "UV_INSECURE_HOST",
        "PIP_DEFAULT_TIMEOUT": "UV_HTTP_TIMEOUT",
        "PIP_CERT": "SSL_CERT_FILE",
        "PIP_PROXY": "ALL_PROXY",
    }
    found = {uv: pip[name] for name, uv in names.items() if pip.get(name) and uv not in pip}
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    if "UV_INDEX" in found:
        found.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # pip looks in every index
    return found


@dataclass(frozen=True)
class Environment:
    """A ready environment: its Python, and the ComfyUI it can run."""

    root: Path
    python: Path
    comfyui: Path
    own_comfyui: bool  # the user's, named by COMFYUI_PATH

    def run(self, *arguments: str) -> int:
        """Run the environment's Python at the repo root; its exit status.

        KeyboardInterrupt comes after the child, which has had it too, is done.
        """
        variables = os.environ | {"COMFYUI_PATH": str(self.comfyui)} | self._bytecode()
        process = subprocess.Popen([str(self.python), *arguments], cwd=self.root, env=variables)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except SystemExit:  # a SIGTERM, which the child has not had
            if os.name != "nt":
                process.send_signal(signal.SIGINT)  # pytest and the demo stop their server on it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
            process.terminate()
            process.wait()
            raise

    def _bytecode(self) -> dict[str, str]:
        """Where nobody may leave compiled files beside the sources: a place of our own for them.

        Without any, each start of ComfyUI compiles torch anew, which takes longer than all else.
        """
        if not os.environ.get("PYTHONDONTWRITEBYTECODE"):
            return {}
        cache = self.python.parent.parent / "pycache"
        return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}


class Setup:
    """Makes the environment of the checkout at ``root``: ``.venv`` and ``.host``.

    With another ``python`` (see :func:`interpreter`) or other ``packages`` (what pip takes, in place of
    the versions that ComfyUI asks for) it is one of its own, below ``.host``.
    """

    def __init__(
        self,
        root: Path,
        comfyui_path: str | None = None,
        python: str | None = None,
        packages: Sequence[str] = (),
    ):
        self.root, self.venv, self.host = root, root / ".venv", root / ".host"
        self.base, version = (
            getattr(sys, "_base_executable", sys.executable),
            sys.version.split()[0],
        )
        self.packages = tuple(packages)
        if python:
            self.base, version = interpreter(python)
        if python or packages:
            name = "-".join(("venv", version, *packages))
            self.venv = self.host / re.sub(r"[^\w.-]+", "-", name)
        self.version = version
        self.own_comfyui = bool(comfyui_path)
        if comfyui_path:
            self.comfyui = Path(comfyui_path).expanduser().resolve()
        else:
            self.comfyui = self.host / f"ComfyUI-{COMFYUI_VERSION}"
        folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
        self.python = self.venv / folder / f"python{suffix}"
        self.stamp = self.venv / "qsched-setup.json"
        self.log = self.host / "setup.log"

    def prepare(self) -> Environment:
        """Install what is missing. SetupError has one line that names the fix."""
        if self.own_comfyui:
            check_comfyui(self.comfyui)
        if not self._is_current():
            try:
                self._install()
            except OSError as error:
                raise SetupError(explain(str(error), self.log)) from error
        return Environment(self.root, self.python, self.comfyui, self.own_comfyui)

    def fingerprint(self) -> dict[str, str]:
        """What the environment was made from; it is current while this stays the same."""
        lists = [",".join((*TORCH, *TOOLS, *self.packages))]
        for folder in (self.comfyui, self.root):
            lists.append((folder / "requirements.txt").read_text(encoding="utf-8"))
        return {
            "requirements": hashlib.sha256("\n".join(lists).encode()).hexdigest(),
            "python": self._python_version() or "",
            "comfyui": str(self.comfyui),
        }

    def _is_current(self) -> bool:
        try:
            return json.loads(self.stamp.read_text(encoding="utf-8")) == self.fingerprint()
        except (OSError, ValueError):
            return False

    def _python_version(self) -> str | None:
        """The version of the environment's Python; None if there is none that runs."""
        return version_of(str(self.python))

    def _install(self) -> None:
        self.host.mkdir(exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self.stamp.unlink(missing_ok=True)
        note(f"setting up {self.venv} (log: {self.log})")
        for attempt in ("adopt", "rebuild"):
            self._make_venv(anew=attempt == "rebuild")
            pip = self._pip()
            if not self.own_comfyui:
                install_comfyui(self.comfyui, pip, self.log)
            elif comfyui_version(self.comfyui) != COMFYUI_VERSION:
                found = comfyui_version(self.comfyui)
                note(f"  COMFYUI_PATH is ComfyUI {found}; tested with {COMFYUI_VERSION}")
            self._install_packages(pip)
            damage = self._stage("check", [str(self.python), "-c", f"import {IMPORTS}"])
            if damage is None:
                break
            if attempt == "rebuild":
                raise SetupError(explain(damage, self.log))
            note("  the environment is damaged; building it anew")
        partial = self.stamp.with_suffix(".partial")
        partial.write_text(json.dumps(self.fingerprint(), indent=1), encoding="utf-8")
        partial.replace(self.stamp)

    def _stage(self, title: str, command: list[str], **variables: str) -> str | None:
        """Run one stage; None if it went well, its output if not."""
        return run_stage(title, command, self.log, os.environ | variables)

    def _make_venv(self, anew: bool) -> None:
        version = self._python_version()
        if version and not anew:
            found = tuple(int(n) for n in version.split("."))
            if PYTHON_OLDEST <= found[:2] <= PYTHON_NEWEST:
                return
        if self.venv.exists():
            if Path(sys.prefix).resolve() == self.venv.resolve():
                raise SetupError(
                    f"{self.venv} must be rebuilt, but it runs this command; "
                    "run it with your system's Python: python3 dev.py ..."
                )
            shutil.rmtree(self.venv)
        free = shutil.disk_usage(self.root).free / 1e9
        if free < DISK_GB:
            raise SetupError(
                f"{free:.1f} GB free on the disk of {self.root}; the environment needs about "
                f"{DISK_GB} GB: free some space and run this again"
            )
        title = f"virtual environment, Python {self.version}"
        if self._stage(title, [self.base, "-m", "venv", str(self.venv)]) is None:
            return
        # Debian splits ensurepip off; the system's pip can serve the environment from outside.
        shutil.rmtree(self.venv, ignore_errors=True)
        failure = self._stage(
            f"{title}, without pip", [self.base, "-m", "venv", "--without-pip", str(self.venv)]
        )
        if failure is not None:
            raise SetupError(explain(failure, self.log))

    def _pip(self) -> list[str]:
        """The command of a pip that installs into the environment."""
        inside = [str(self.python), "-m", "pip"]
        if _works([*inside, "--version"]):
            return inside
        if _works([str(self.python), "-m", "ensurepip"]) and _works([*inside, "--version"]):
            return inside
        outside = [getattr(sys, "_base_executable", sys.executable), "-m", "pip"]
        outside += ["--python", str(self.python)]
        if _works([*outside, "--version"]):
            return outside
        raise SetupError(
            "this Python has neither pip nor ensurepip; install them "
            "(Debian, Ubuntu: apt install python3-venv) and run this again"
        )

    def _install_packages(self, pip: list[str]) -> None:
        installers = [([*pip, "install"], {})]
        uv = [str(self.python), "-m", "uv", "pip", "install", "--python", str(self.python)]
        if self._stage("uv", [*pip, "install", "--quiet", "uv"]) is None:
            installers.insert(0, (uv, uv_variables(dict(os.environ))))
        # The first list's versions hold for the second too.
        pins = self.host / "constraints.txt"
        pins.write_text("\n".join(TORCH) + "\n", encoding="utf-8")
        lists = [self.comfyui / "requirements.txt", self.root / "requirements.txt"]
        rest = [item for path in lists for item in ("-r", str(path))]
        size = f" (about {DISK_GB - 2} GB)" if sys.platform == "linux" else ""
        steps = [
            (f"PyTorch {TORCH[0].split('==')[1]}{size}", list(TORCH)),
            ("ComfyUI's and the pack's packages", [*rest, *TOOLS, "-c", str(pins)]),
        ]
        if self.packages:
            steps.append((", ".join(self.packages), [*self.packages, "-c", str(pins)]))
        for title, packages in steps:
            for command, variables in installers:
                failure = self._stage(title, [*command, *packages], **variables)
                if failure is None:
                    break
                if re.search(r"no space left|os error 28|errno 28", failure, re.I):
                    raise SetupError(explain(failure, self.log))
            else:
                raise SetupError(explain(failure, self.log))


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
