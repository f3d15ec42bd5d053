"""Files are whole or not there, and their names can't leave the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core import files
from qsched_core.files import safe_name, write_atomic


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
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_leave_the_folder_or_a_system_are_refused(name):
    with pytest.raises(ValueError, match="name=") as error:
        safe_name(name)
    assert len(str(error.value)) < 700
    assert str(error.value).encode()


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
