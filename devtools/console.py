"""What a person sees while dev.py works: a line a stage, and one clear line when it fails."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

REASONS = (
    (
        r"no space left|errno 28|os error (28|112)\b|not enough space|disk quota",
        "the disk is full; free some space (see `{log}`) and run this again",
    ),
    (
        r"certificate.?verify.?failed|invalid peer certificate|SSLError",
        "the package index's certificate is not trusted; set PIP_CERT to your network's "
        "certificate bundle and run this again",
    ),
    (
        r"name resolution|name or service not known|getaddrinfo failed|nodename nor servname"
        r"|NewConnectionError|establish a new connection|network is unreachable|dns error"
        r"|connection refused|connect(ion)?.?timed? ?out|ReadTimeout|error sending request"
        r"|connection reset|cannot connect to proxy|from versions: none",
        "the package index cannot be reached, or lacks the package; check the network, or pip's "
        "settings (PIP_INDEX_URL, PIP_PROXY), and run this again (see `{log}`)",
    ),
    (
        r"permission denied|errno 13|access is denied",
        "permission denied; make the folder writable, close what uses it (see `{log}`) "
        "and run this again",
    ),
    (
        r"no matching distribution|no solution found",
        "a package has no version for this Python or system (see `{log}`); "
        "try another Python between 3.10 and 3.14",
    ),
)


class SetupError(RuntimeError):
    """The environment cannot be made; the message is one line that names the fix."""


def explain(output: str, log: Path) -> str:
    """One line for a failed stage's ``output``: what is wrong and what to do."""
    for pattern, reason in REASONS:
        if re.search(pattern, output, re.IGNORECASE):
            return reason.format(log=log)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'a command failed'} (the whole output is in {log})"


def note(text: str) -> None:
    print(text, flush=True)


def run_stage(title: str, command: list[str], log: Path, variables: dict[str, str]) -> str | None:
    """Run ``command`` with its output in ``log``; None if it went well, its output if not."""
    start, live = time.monotonic(), sys.stdout.isatty()
    print(f"  {title} ...", end="", flush=True)
    with open(log, "a+b") as file:
        file.write(f"\n== {title}\n".encode())
        file.flush()
        begin = file.seek(0, 2)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=variables
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(1)
                except subprocess.TimeoutExpired:
                    if live:
                        seconds = time.monotonic() - start
                        print(f"\r  {title} ... {seconds:.0f} s", end="", flush=True)
        except BaseException:
            process.kill()
            process.wait()
            print()
            raise
        file.seek(begin)
        output = file.read().decode("utf-8", errors="replace")
    seconds = time.monotonic() - start
    verdict = "" if process.returncode == 0 else " (failed)"
    print(f"{chr(13) + '  ' + title + ' ...' if live else ''} {seconds:.1f} s{verdict}", flush=True)
    return None if process.returncode == 0 else output or f"exit status {process.returncode}"
