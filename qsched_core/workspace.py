"""Where files are written before they get their names, and what killed writers left of that.

A writer works in a folder of its own beside the file's place, and holds the system's lock on a file
in it.  The lock goes with the process, however that ends, and is no other's who gets its number.  So
a folder whose lock is free was left behind; the next writer removes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

QUIET_SECONDS = 3600  # without a change, where a lock alone does not tell
OLD_QUIET_SECONDS = 24 * 3600  # for files of earlier versions, which were not locked
MOST_LABEL = 60  # characters of the file's name in the folder's
MOST_HEADER = 2**24  # bytes of a temporary file that are searched for our mark
LOCK, DATA = "lock", "data"
_OURS = re.compile(r"\..*\.([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]{8}\.partial", re.DOTALL)
# earlier versions': of any file with a dot in front, of parts of evaluations and models without
_EARLIER = re.compile(
    r"(\..+\.(json|csv|png|safetensors)|.+\.safetensors)\.[0-9a-f]{8}\.partial", re.DOTALL
)
_LIBRARYS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # safetensors' own, before it renames
_UNKNOWN = "0" * 8


@cache
def _machine() -> str:
    """The same in each process of this machine; another's is another."""
    known = ""
    with suppress(OSError):
        known = Path("/etc/machine-id").read_text().strip()
    if not known and not uuid.getnode() >> 40 & 1:  # that bit says the number is a random one
        known = str(uuid.getnode())
    name = platform.node() if os.path.exists("/proc") else ""  # macOS' changes with the network
    return hashlib.sha256(f"{known} {name}".encode()).hexdigest()[:8]


@cache
def _boot() -> str:
    """The same in each process that this start of the system runs, in containers too."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return _UNKNOWN
    return hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def _locked(folder: Path) -> FileLock | None:
    """The lock of a workspace, held until it is released; None where another has it."""
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


class Workspace:
    """A folder of the writer's own in ``folder``, as a context manager; it goes when that is left.

    ``data`` is where the file called ``name`` is to be written, and renamed from.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.label = folder, name.encode()[:MOST_LABEL].decode(errors="ignore")

    def __enter__(self) -> Workspace:
        while not self._made():  # one that cleans up was quicker
            pass
        self.data = self.path / DATA
        return self

    def _made(self) -> bool:
        """Whether the folder is there, and locked."""
        who = f"{_machine()}-{_boot()}-{secrets.token_hex(4)}"
        self.path = self.folder / f".{self.label}.{who}.partial"
        self.path.mkdir()
        try:
            self._lock = _locked(self.path)
            mine = self._lock is not None and (self.path / LOCK).exists()
        except (
            FileNotFoundError,
            FileExistsError,
        ):  # an empty folder goes at once, as the lock is made
            return False
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        if not mine:
            shutil.rmtree(self.path, ignore_errors=True)
        return mine

    def __exit__(self, *exception) -> None:
        self._lock.release()  # Windows removes no open file
        shutil.rmtree(self.path, ignore_errors=True)


def remove_abandoned(folder: str | Path, deep: bool = False) -> int:
    """Remove what killed writers left in ``folder`` (``deep``: and below it); its size in bytes.

    A living writer's stays, and so does what another machine wrote into a shared folder.  What can't
    be read or removed is left alone.
    """
    total = 0
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if not name.endswith(".partial") and not _LIBRARYS.fullmatch(name):
                continue
            with suppress(OSError):
                size = _size(path)
                if _removed(path):
                    total += size
                    logger.info("removed %s (%d bytes), which a killed run left", path, size)
        folders[:] = [f for f in folders if not f.endswith(".partial")] if deep else []
    return total


def _removed(path: Path) -> bool:
    ours = _OURS.fullmatch(path.name)
    if ours and path.is_dir() and not path.is_symlink():
        return _remove_folder(path, *ours.groups())
    earlier = _EARLIER.fullmatch(path.name) or _LIBRARYS.fullmatch(path.name)
    if not earlier or not path.is_file() or path.is_symlink():
        return False
    if not _quiet(path, OLD_QUIET_SECONDS):
        return False
    if _LIBRARYS.fullmatch(path.name) and not _marked(path):
        return False
    path.unlink()
    return True


def _remove_folder(path: Path, machine: str, boot: str) -> bool:
    if not _holds_ours(path):
        return False
    here = boot == _boot() != _UNKNOWN  # on one system a lock tells all there is to know
    if not here and machine != _machine():
        return False
    if not here and not _quiet(path, QUIET_SECONDS):
        return False
    if not (path / LOCK).exists():  # killed before it had one, or another is removing it
        if here and not any(path.iterdir()):
            path.rmdir()  # a writer that has just made it makes another
            return True
        if not _quiet(path, QUIET_SECONDS):
            return False
    else:
        lock = _locked(path)
        if lock is None:
            return False
        lock.release()
    shutil.rmtree(path)
    return True


def _holds_ours(path: Path) -> bool:
    """Whether nothing is in the folder but what a writer puts there: no one else's work goes."""
    return all(
        (entry.name in (LOCK, DATA) or _LIBRARYS.fullmatch(entry.name))
        and entry.is_file(follow_symlinks=False)
        for entry in os.scandir(path)
    )


def _quiet(path: Path, seconds: float) -> bool:
    """Whether nothing of ``path`` has changed for so long."""
    places = [path, *path.iterdir()] if path.is_dir() else [path]
    return time.time() - max(p.stat().st_mtime for p in places) > seconds


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir())


def _marked(path: Path) -> bool:
    """Whether a safetensors file has this pack's metadata: another program's is not ours to remove."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return b'"qsched"' in file.read(min(length, MOST_HEADER))
