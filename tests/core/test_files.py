"""Files are whole or not there, and their names can't leave the folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core import files
from qsched_core.files import (
    DiskError,
    check_prefix,
    check_room,
    inside,
    safe_name,
    write_atomic,
)


def test_a_name_can_t_be_taken_between_the_look_and_the_rename(tmp_path, monkeypatch):
    """On a file system without hard links, as exFAT and some shares are."""
    path, replace = tmp_path / "a.json", os.replace

    def unsupported(*_):
        raise PermissionError("no hard links on this file system")

    def late(source, target):
        with pytest.raises(FileExistsError):  # another process, in the moment before the rename
            os.open(target, os.O_CREAT | os.O_EXCL)
        replace(source, target)

    monkeypatch.setattr(files.os, "link", unsupported)
    monkeypatch.setattr(files.os, "replace", late)
    write_atomic(path, "mine", overwrite=False)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "mine")]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_no_trace(tmp_path, monkeypatch, failing):
    path = write_atomic(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize("links", [True, False])
def test_an_existing_file_stays_unless_overwritten(tmp_path, monkeypatch, links):
    if not links:

        def unsupported(*_):
            raise PermissionError("no hard links on this file system")

        monkeypatch.setattr(files.os, "link", unsupported)
    path = write_atomic(tmp_path / "a.json", "old", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomic(path, "new", overwrite=False)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.json"
    script = (
        "import sys; sys.path.append(sys.argv[1]); from qsched_core.files import write_atomic\n"
        "for i in range(10**9): write_atomic(sys.argv[2], str(i % 10) * 10**6)"
    )
    root = os.path.dirname(os.path.dirname(files.__file__))
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, root, str(path)]) as writer:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            for _ in range(50):
                text = path.read_text()
                assert text == text[:1] * 10**6
            writer.kill()
        text = path.read_text()
        assert text == text[:1] * 10**6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux nf4", "flux nf4.json"),
        ("flux.json", "flux.json"),
        ("v1.5 4-step", "v1.5 4-step.json"),
        ("sub/flux", "sub/flux.json"),
        (r"sub\flux", "sub/flux.json"),
        ("\u6a21\u578b", "\u6a21\u578b.json"),
        ("e\u0301", "\u00e9.json"),  # one name, however its accent was typed
        ("a..b", "a..b.json"),
    ],
)
def test_names_are_kept_as_they_are(name, expected):
    assert str(safe_name(name)) == expected


BAD = [
    "", " ", ".", "..", ".json", "../a", "a/../b", "a/./b", "/etc/passwd", "a//b", "a/", r"..\a",
    r"C:\a", "C:a", r"\\server\share\a", "a.", "a /b", "a\0b", "a\nb", "a\ud800", "con", "NUL.json",
    "lpt1.txt", "a/Aux/b", "a?", "a|b", "<a>", ".git/a", "x" * 300, "/".join("ab" * 100),
    "COM\u00b9", "lpt\u00b3.a", "con .a", "a/conin$", "CONOUT$.a", "photo\u202egnp", "a\u200b",
    "a\u2066b", "a\u2028b", "\ufeffa", "a\x9b31m",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_leave_the_folder_or_a_system_are_refused(name):
    with pytest.raises(ValueError, match="name=") as error:
        safe_name(name)
    assert len(str(error.value)) < 700
    assert str(error.value).encode()


@pytest.mark.parametrize(
    "prefix",
    [
        "a\x1b[31mb", "a\nb", "a\0b", "a\u202eb", "a\ud800", "a:stream", "a|b", "con.x", "con/x",
        "a\\COM\u00b9\\x", "nul .x", "x" * 10**6, "C:evil",
    ],
)  # fmt: skip
def test_a_prefix_that_another_system_takes_for_something_else_is_refused(prefix):
    with pytest.raises(ValueError, match=r"^filename_prefix=") as error:
        check_prefix(prefix)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "prefix",
    [
        "", "a", "diffusion_models/quantized", r"sub\a", "sub/", "con", "../a", "/srv/output/a",
        "v1.5 4-step", "%date:yyyy-MM-dd%/a_%width%", "\u6a21\u578b", ".kept",
    ],
)  # fmt: skip
def test_where_a_prefix_leads_is_left_to_the_host(prefix):
    check_prefix(prefix)


def test_what_lies_outside_is_refused_before_the_system_is_asked(tmp_path, monkeypatch):
    """On Windows looking at another host's share tells that host who the user is."""
    root = tmp_path / "input"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").touch()
    found = root / "sub" / "a.txt"
    assert inside(root, "sub/a.txt") == inside(root, r"sub\a.txt") == found
    assert inside(root, str(found)) == inside(root, "x/../sub/a.txt") == found
    (tmp_path / "b.txt").touch()
    try:
        (root / "link.txt").symlink_to(tmp_path / "b.txt")
    except OSError:
        pytest.skip("links are not allowed here")
    assert inside(root, "link.txt") is None
    monkeypatch.setattr(Path, "resolve", lambda path: pytest.fail(f"{path} was looked at"))
    for name in (
        "../b.txt",
        "//server/share/b.txt",
        r"\\server\share\b.txt",
        "/etc/passwd",
        "a\0/../..",
    ):
        assert inside(root, name) is None


@given(st.text(st.sampled_from("a./\\ :\u00e9\ud800C~\0")) | st.text(max_size=40))
def test_a_safe_name_stays_inside(name):
    try:
        path = safe_name(name)
    except ValueError:
        return
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert path.suffix.lower() == ".json"
    assert safe_name(str(path)) == path


ERRORS = {
    errno.ENOSPC: r"disk is full: it takes 2\.0 MB, .* free; free some space",
    errno.EDQUOT: r"quota is used up: it takes 2\.0 MB, .* free; free some space",
    errno.EROFS: "read-only .*make it writable",
    errno.EACCES: "access is denied .*make the folder writable",
    errno.EIO: "drive does not answer .*connected",
    errno.ENODEV: "drive does not answer .*connected",
    errno.ENAMETOOLONG: "choose another name",
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["fsync", "mkdir", "replace"])
def test_an_error_of_the_disk_names_the_file_and_what_to_do(tmp_path, monkeypatch, number, where):
    path = write_atomic(tmp_path / "a.json", "old")

    def fails(*_, **__):
        raise OSError(number, os.strerror(number), "something internal")

    owner = files.Path if where == "mkdir" else files.os  # Python 3.10's paths keep os.mkdir
    monkeypatch.setattr(owner, where, fails)
    with pytest.raises(DiskError, match=ERRORS[number]) as told:
        write_atomic(path, bytes(2 * 10**6))
    monkeypatch.undo()
    assert told.value.errno == number
    assert str(path) in str(told.value) and "something internal" not in str(told.value)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_what_free_space_does_not_show_is_found_before_the_work(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(DiskError, match=ERRORS[number]):
        check_room(tmp_path / "a.json", 2 * 10**6)
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_told_before_the_work(tmp_path):
    check_room(tmp_path / "a.json", 0)
    with pytest.raises(DiskError, match=r"a\.json .*takes 1000000000\.00 GB and .* GB free"):
        check_room(tmp_path / "a.json", 10**18)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    kept = write_atomic(small_disk / "a.json", "old")
    with pytest.raises(DiskError, match=r"a\.json .*full: it takes 2\.0 MB, .* has 1\.0 MB free"):
        write_atomic(kept, bytes(2 * 10**6))
    assert [(p.name, p.read_text()) for p in small_disk.iterdir()] == [("a.json", "old")]
    with pytest.raises(DiskError, match=r"b\.json .*has 1\.0 MB free"):
        check_room(small_disk / "b.json")
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(DiskError, match=r"a\.json .*read-only"):
        write_atomic(kept, "new")
    assert kept.read_text() == "old"
