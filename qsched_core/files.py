"""Whole files or none, under names that every system can hold."""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from .errors import plainly_named
from .text import plain, shown
from .workspace import Workspace, remove_abandoned

# Names that Windows gives to devices, in any folder and with any extension.
_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"%[^%/\\]*%")  # ComfyUI writes the date and the like in its place
MOST_NAME = 1024  # characters of a name that is looked up; no file system holds longer ones
PROBE_BYTES, SPARE_BYTES = 2**16, 2**24
_MOST_BYTES = 180  # a part may have 255, a path on Windows 260; the temporary name is longer


def safe_name(name: str, extension: str = ".json") -> PurePosixPath:
    """``name`` as a relative path with ``extension``, the same on every system.

    Both slashes separate folders.  ValueError says what is wrong with a name that could leave the
    folder, or that another system could not hold: a shared workflow carries it there.
    """
    if (
        len(name) > 2 * _MOST_BYTES
    ):  # first, since the time of normalizing may grow with the square of the length
        raise ValueError(f"name={shown(name)} is longer than {_MOST_BYTES} bytes; give a short one")
    path = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if not path.lower().endswith(extension):
        path += extension
    reason = _unusable(path[: -len(extension)])
    if reason:
        raise ValueError(f"name={shown(name)} {reason}; give a plain file name, or folder/name")
    return PurePosixPath(path)


def _unusable(path: str) -> str:
    """Why a file can't be called so; empty if it can."""
    for part in path.split("/"):
        if not part:
            return "is empty, absolute, or has an empty part"
        if part.startswith(".") or part.endswith((".", " ")):
            return "has a part that begins with a dot, or ends with a dot or space"
        reason = _unusable_part(part)
        if reason:
            return reason
    if len(path.encode()) > _MOST_BYTES:
        return f"is longer than {_MOST_BYTES} bytes"
    return ""


def _unusable_part(part: str) -> str:
    """Why no file or folder can be called so, wherever it is; empty if one can."""
    if re.search(r'[<>:"|?*]', part) or plain(part) != part:
        return "has a character that not every file system can hold, or that can't be seen"
    if _DEVICES.fullmatch(part):
        return f"has the part {shown(part)}, which is a device on Windows"
    return ""


def check_prefix(prefix: str) -> None:
    """ValueError for a ``filename_prefix`` whose names some system can't hold, or takes for a device.

    Where it leads is not looked at: the host sees to that.
    """
    reason = ""
    if len(prefix) > 2 * _MOST_BYTES:
        reason = f"is longer than {2 * _MOST_BYTES} characters"
    else:
        *folders, name = _PLACEHOLDER.sub("", os.path.splitdrive(prefix)[1]).split("/")
        # The host goes on with a number, so that only what has a dot is left a device.
        parts = [p for folder in [*folders, f"{name}_"] for p in folder.split("\\")]
        reason = next(filter(None, map(_unusable_part, parts)), "")
    if reason:
        raise ValueError(
            f"filename_prefix={shown(prefix)} {reason}; give a plain name, or folder/name"
        )


def inside(root: Path, name: str) -> Path | None:
    """The path ``name`` in the folder ``root``, None where it lies elsewhere, through a link too.

    What is elsewhere by its name is not looked at: it may be on another host.
    """
    try:
        path = Path(os.path.abspath(root / name.replace("\\", "/")))
        if not path.is_relative_to(os.path.abspath(root)):
            return None
        path, root = path.resolve(), root.resolve()
    except (OSError, ValueError):  # a name that no file system can hold
        return None
    return path if path.is_relative_to(root) else None


@plainly_named
class DiskError(OSError):
    """A file that can't be written; the message names it, the space it takes, and what to do."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.errno = number


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM}
_GONE = {errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ENOENT}


def disk_error(
    error: OSError, path: Path, needed: int | None = None, folder: Path | None = None
) -> DiskError:
    """``error``, met while ``needed`` bytes were written to ``path``, in words a user can act on.

    ``folder`` is whose disk it is, if not that of the file's folder.
    """
    if isinstance(error, DiskError):  # told already
        return error
    folder = path.parent if folder is None else folder
    number, reason = error.errno, error.strerror or str(error)
    if number in _FULL:
        what = "the quota is used up" if number == errno.EDQUOT else "the disk is full"
        there = _free(folder)
        room = "" if there is None else f", {folder} has {size_text(there)} free"
        takes = "" if needed is None else f": it takes {size_text(needed)}{room}"
        return DiskError(
            f"{path} can't be written, {what}{takes}; free some space, or choose another folder "
            f"({reason})",
            number,
        )
    if number == errno.EROFS:
        what, fix = "its disk is read-only", "make it writable, or choose another"
    elif number in _DENIED:
        what = "access is denied"
        fix = "make the folder writable, close what has the file open, or choose another"
    elif number in _GONE:
        what, fix = "its drive does not answer", "see whether it is connected, or choose another"
    else:
        what, fix = "the system refuses", "choose another name or folder"
    return DiskError(f"{path} can't be written, {what} ({reason}); {fix}", number)


def size_text(count: int) -> str:
    """A number of bytes to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def check_room(path: str | Path, needed: int = 0) -> None:
    """DiskError unless a file of ``needed`` bytes can be written to ``path``, and some to spare.

    For the moment before long work.  A little is written, as a quota and a drive that was unplugged
    do not show otherwise.
    """
    check_folder(Path(path).parent, needed, Path(path))


def check_folder(folder: Path, needed: int, subject: Path | None = None) -> None:
    """As :func:`check_room`, for what is called ``subject`` (else the folder itself)."""
    subject = folder if subject is None else subject
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        with Workspace(folder, "probe") as work:
            _write(work.data, bytes(PROBE_BYTES))
    except OSError as error:
        raise disk_error(error, subject, needed, folder) from error
    if free < needed + SPARE_BYTES:
        raise DiskError(
            f"{subject} can't be written, the disk is too full: it takes {size_text(needed)} and "
            f"{size_text(SPARE_BYTES)} to spare, {folder} has {size_text(free)} free; free some "
            "space, or choose another folder",
            errno.ENOSPC,
        )


def write_atomic(path: str | Path, data: str | bytes, overwrite: bool = True) -> Path:
    """Write ``data`` to ``path``, whole or not at all; DiskError leaves no trace.

    With ``overwrite`` False an existing file stays, and FileExistsError is raised.
    """
    payload = data.encode() if isinstance(data, str) else data
    write = partial(_write, payload=payload)
    return write_whole(write, [Path(path)], len(payload), overwrite)


def write_whole(
    write: Callable[[Path], object],
    paths: Iterable[Path],
    needed: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Have ``write`` make a file, and give it the first name of ``paths`` that is free: that one.

    No two writers get one name, in whatever processes they are.  The file is whole under its name or
    not there.  ``needed`` is its size in bytes, for the message of a DiskError; FileExistsError if
    all names are taken.  With ``overwrite`` the first name replaces what has it.
    """
    paths = iter(paths)
    path = next(paths)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        with Workspace(path.parent, path.name) as work:
            write(work.data)
            while True:
                try:
                    if overwrite:
                        os.replace(work.data, path)
                    else:
                        _rename_new(work.data, path)
                    return path
                except FileExistsError:
                    following = next(paths, None)
                    if following in (None, path):
                        raise
                    path = following
                    path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise disk_error(error, path, needed) from error


def _write(path: Path, payload: bytes) -> None:
    with open(path, "xb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _rename_new(source: Path, path: Path) -> None:
    """Give ``source`` the name ``path``, which must be free."""
    try:
        os.link(source, path)  # fails where the name is taken, with no moment in between
        return
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "xb"):  # so does this, which takes the name
            pass
    try:
        os.replace(source, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
