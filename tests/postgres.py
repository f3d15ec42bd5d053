"""A PostgreSQL of the tests' own: Debian's package, in a temporary folder, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devtools.server import free_port

USER, PASSWORD, DATABASE = "qsched", "secret-word", "studies"


def programs() -> Path | None:
    """The folder of initdb and postgres: on the PATH, or where Debian puts them."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "postgres").exists()), None)


def why_not() -> str | None:
    """Why there is no PostgreSQL here, or None."""
    if programs() is None:
        return "needs PostgreSQL (Debian: apt install postgresql); there is no initdb here"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no user postgres here"
        if shutil.which("setpriv") is None:
            return "PostgreSQL does not run as root, and there is no setpriv (util-linux) here"
    return None


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database, with its password."""
    folder = Path(tempfile.mkdtemp(prefix="qsched-pg-"))
    who: list[str] = []
    if os.geteuid() == 0:
        # subprocess's own `user` copies this process first, which fails where it is larger than memory.
        who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    port, data, word = free_port(), folder / "data", folder / "word"
    word.write_text(PASSWORD, encoding="utf-8")
    word.chmod(0o644)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [*who, programs() / program, *arguments], check=True, cwd=folder, capture_output=True,
            env={**os.environ, "PGPASSWORD": PASSWORD, "LC_ALL": "C"}, timeout=60,
        )  # fmt: skip

    server = ["-D", str(data), "-w", "-l", str(folder / "log")]
    try:
        run("initdb", "-D", str(data), "-U", USER, "-A", "scram-sha-256", "--pwfile", str(word),
            "-E", "UTF8", "--no-sync")  # fmt: skip
        where = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", *server, "-o", where, "start")
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", USER, DATABASE)
        yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/{DATABASE}"
    finally:
        if (data / "postmaster.pid").exists():
            run("pg_ctl", *server, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
