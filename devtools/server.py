"""A real ComfyUI server as a child process, and the few HTTP calls that drive it headless."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

PACK_ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-QSched"

# A proxy of the environment is not for our own server on the loopback.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ServerError(RuntimeError):
    """The server did not start, refused a prompt, or failed while it ran one."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def device_args(python: str = sys.executable) -> tuple[str, ...]:
    """``--cpu`` where the torch of ``python`` has neither CUDA (or ROCm), XPU nor MPS."""
    script = (
        "import torch; x = getattr(torch, 'xpu', None); print(torch.cuda.is_available() "
        "or torch.backends.mps.is_available() or bool(x and x.is_available()))"
    )
    answer = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ServerError(f"torch does not import in {python}:\n{answer.stderr.strip()}")
    return () if answer.stdout.strip().endswith("True") else ("--cpu",)


def link_pack(base: Path) -> Path:
    """Link the pack into ``base/custom_nodes`` (a junction on Windows); returns the link."""
    link = base / "custom_nodes" / PACK_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() or link.exists():
        if link.resolve() == PACK_ROOT:
            return link
        if not link.is_symlink():
            raise ServerError(f"{link} exists and is not this pack; move it away")
        link.unlink()  # a link to where the pack once was
    if sys.platform == "win32":
        # A junction: a symbolic link needs a privilege that few Windows users have.
        command = ["cmd", "/c", "mklink", "/J", str(link), str(PACK_ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(PACK_ROOT, target_is_directory=True)
    return link


class ComfyServer:
    """``with ComfyServer(comfyui, base) as server: server.run(prompt)``.

    ``base`` holds models/, custom_nodes/, input/, output/ and user/ of this server; ``port`` 0 is
    any free one; ``device_args()`` are the ``extra_args`` a machine without a GPU needs.  With
    ``console`` the server writes to this process's output, otherwise to the file ``log``.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        python: str = sys.executable,
        port: int = 0,
        extra_args: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        with_pack: bool = True,
        console: bool = False,
    ):
        self.comfyui, self.base = Path(comfyui).resolve(), Path(base).resolve()
        self.python = python
        self.port, self.extra_args = port or free_port(), tuple(extra_args)
        self.environment = environment or {}
        self.with_pack, self.console = with_pack, console
        self.process: subprocess.Popen | None = None
        self.log = self.base / f"server-{self.port}.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def command(self) -> list[str]:
        return [
            self.python, str(self.comfyui / "main.py"), "--base-directory", str(self.base),
            "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch",
            "--database-url", "sqlite:///:memory:", *self.extra_args,
        ]  # fmt: skip

    def start(self, timeout: float = 180) -> ComfyServer:
        """Start and wait until it answers; ServerError carries the end of the log."""
        for folder in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        if self.with_pack:
            link_pack(self.base)
        if port_in_use(self.port):
            raise ServerError(f"port {self.port} is taken; choose another with --port")
        fixed = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(os.devnull if self.console else self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=None if self.console else log,
                stderr=None if self.console else subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.comfyui,
                env=os.environ | fixed | self.environment,
            )
        try:
            self._wait_until_up(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting:\n{self.log_tail()}")
            try:
                self.get("/system_stats", timeout=5)
                return
            except (OSError, ServerError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 25) -> str:
        """The last lines the server wrote."""
        if self.console:
            return "(its output is above)"
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(_COLOUR.sub("", text).splitlines()[-lines:])

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def request(self, path: str, body: dict | None = None, timeout: float = 60) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with _direct.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(_readable(error.read().decode(errors="replace"))) from None

    def get(self, path: str, timeout: float = 60) -> dict:
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self) -> dict:
        return self.get("/object_info")

    def queue(self, prompt: dict, **extra) -> str:
        """Queue an API-format prompt; returns its id.

        ``extra``: ``client_id`` (whose websocket hears of it), ``extra_data``, ``front``.
        ServerError lists the validation errors.
        """
        return json.loads(self.request("/prompt", {"prompt": prompt} | extra))["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """The history entry of a prompt once it is done; ServerError if it failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry["status"]["completed"]:
                return entry
            if entry is not None and entry["status"]["status_str"] == "error":
                raise ServerError(_execution_error(entry))
            if self.process is not None and self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while running a prompt:\n{self.log_tail()}")
            time.sleep(0.1)
        raise ServerError(f"the prompt was not done within {timeout:.0f} s:\n{self.log_tail()}")

    def run(self, prompt: dict, timeout: float = 600) -> dict:
        """Queue and wait; the outputs by node id are in the entry's ``outputs``."""
        return self.wait(self.queue(prompt), timeout)

    def image(self, entry: dict) -> bytes:
        """The file of one item of an ``images`` output."""
        query = {k: entry[k] for k in ("filename", "subfolder", "type")}
        return self.request(f"/view?{urlencode(query)}")

    def interrupt(self) -> None:
        self.request("/interrupt", {})


def _readable(body: str) -> str:
    """A refused prompt's errors, one a line, naming node, input and reason."""
    try:
        answer = json.loads(body)
        lines = [answer["error"]["message"]]
        for node_id, node in answer.get("node_errors", {}).items():
            lines += [
                f"node {node_id} ({node['class_type']}): {e['message']}: {e['details']}"
                for e in node["errors"]
            ]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return body


def _execution_error(entry: dict) -> str:
    for kind, detail in entry["status"]["messages"]:
        if kind == "execution_error":
            return (
                f"node {detail['node_id']} ({detail['node_type']}): "
                f"{detail['exception_type']}: {detail['exception_message']}"
            )
        if kind == "execution_interrupted":
            return f"interrupted at node {detail['node_id']} ({detail['node_type']})"
    return json.dumps(entry["status"])
