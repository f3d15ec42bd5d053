"""Whole files or none, under names that every system can hold."""

from __future__ import annotations

import errno
import os
import re
import secrets
import unicodedata
from pathlib import Path, PurePosixPath

from .text import shown

# Names that Windows gives to devices, in any folder and with any extension.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)
MOST_NAME = 1024  # characters of a name that is looked up; file systems hold no longer ones
_MOST_BYTES = 180  # a part may have 255, a path on Windows 260; the temporary name is longer


def safe_name(name: str, extension: str = ".json") -> PurePosixPath:
    """``name`` as a relative path with ``extension``, the same on every system.

    Both slashes separate folders.  ValueError says what is wrong with a name that could leave the
    folder, or that another system could not hold: a shared workflow carries it there.
    """
    if (
        len(name) > 2 * _MOST_BYTES
    ):  # first: normalizing takes the square of the length at its worst
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
        if re.search(r'[<>:"|?*]', part) or any(
            unicodedata.category(c) in ("Cc", "Cs") for c in part
        ):
            return "has a character that not every file system can hold"
        if _DEVICES.fullmatch(part):
            return f"has the part {shown(part)}, which is a device on Windows"
    if len(path.encode()) > _MOST_BYTES:
        return f"is longer than {_MOST_BYTES} bytes"
    return ""


def write_atomic(path: str | Path, data: str | bytes, overwrite: bool = True) -> Path:
    """Write ``data`` to ``path`` through a temporary file beside it; OSError leaves no trace.

    With ``overwrite`` False an existing file stays, and FileExistsError is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_new(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def _rename_new(partial: Path, path: Path) -> None:
    """Give ``partial`` the name ``path``, which must be free."""
    try:
        os.link(partial, path)  # fails where the name is taken, with no moment in between
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(partial, path)
    else:
        partial.unlink()
