"""What killed writers left goes; what a living one, or another machine, is writing stays."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsched_core import files, workspace
from qsched_core.files import write_atomic, write_whole
from qsched_core.workspace import Workspace, remove_abandoned

ROOT = str(Path(files.__file__).parents[1])
WRITER = """
import sys; sys.path.append(sys.argv[1])
from pathlib import Path
from qsched_core.files import write_whole
def write(place):
    place.write_bytes(bytes(10**6))
    print("writing", flush=True)
    sys.stdin.read()
write_whole(write, [Path(sys.argv[2])])
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is in the middle of a file."""
    command = [sys.executable, "-c", WRITER, ROOT, str(tmp_path / "model")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline().strip() == b"writing"
        yield process
        process.kill()


def test_the_next_save_removes_what_a_killed_writer_left(tmp_path, writer):
    write_atomic(tmp_path / "a.json", "a")
    assert len(list(tmp_path.iterdir())) == 2, "a living writer's stays"
    writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_atomic(tmp_path / "b.json", "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_living_writer_finishes_whatever_cleans_up(tmp_path, writer):
    assert remove_abandoned(tmp_path, deep=True) == 0
    writer.communicate()
    assert writer.returncode == 0
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("model", 10**6)]


def left_behind(folder: Path, **names: str) -> Path:
    """A workspace whose writer is gone, and who that was."""
    work = Workspace(folder, "model.safetensors").__enter__()
    work.data.write_bytes(b"half")
    work._lock.release()
    known = {"machine": workspace._machine(), "boot": workspace._boot()} | names
    return work.path.rename(
        work.path.with_name(f".model.{known['machine']}-{known['boot']}-01234567.partial")
    )


def aged(path: Path, seconds: float) -> None:
    for place in (*(path.iterdir() if path.is_dir() else ()), path):
        os.utime(place, (time.time() - seconds,) * 2)


@pytest.mark.parametrize(
    ("names", "age", "goes"),
    [
        ({}, 0, workspace._boot() != "0" * 8),
        ({"boot": "aaaaaaaa"}, 0, False),  # it may be a twin, whose lock is not seen here
        ({"boot": "aaaaaaaa"}, 4000, True),  # this machine was started again
        ({"machine": "aaaaaaaa", "boot": "bbbbbbbb"}, 10**6, False),
        ({"machine": "aaaaaaaa"}, 4000, workspace._boot() != "0" * 8),  # a container of this one
    ],
)
def test_only_a_writer_that_is_known_to_be_gone_loses_its_file(tmp_path, names, age, goes):
    path = left_behind(tmp_path, **names)
    aged(path, age)
    assert remove_abandoned(tmp_path) == (4 if goes else 0)
    assert path.exists() != goes


def test_a_folder_without_a_lock_goes_after_a_while(tmp_path):
    path = left_behind(tmp_path)
    (path / "lock").unlink()
    assert remove_abandoned(tmp_path) == 0
    aged(path, 4000)
    assert remove_abandoned(tmp_path) == 4


def test_an_empty_folder_of_this_system_goes_at_once(tmp_path):
    """Its writer was killed before it had its lock; one that is alive makes another folder."""
    path = left_behind(tmp_path)
    (path / "lock").unlink()
    (path / "data").unlink()
    remove_abandoned(tmp_path)
    assert path.exists() == (workspace._boot() == "0" * 8)


@pytest.mark.parametrize(
    "error", [FileNotFoundError, FileExistsError]
)  # the lock's library has both
def test_a_writer_whose_empty_folder_was_removed_makes_another(tmp_path, monkeypatch, error):
    real, calls = workspace._locked, []

    def too_late(folder):
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()
            raise error(folder)
        return real(folder)

    monkeypatch.setattr(workspace, "_locked", too_late)
    with Workspace(tmp_path, "a") as work:
        work.data.write_text("x")
        assert list(tmp_path.iterdir()) == [work.path] and len(calls) == 2
    assert not list(tmp_path.iterdir())


def safetensors_of(metadata: dict) -> bytes:
    header = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("name", "data", "goes"),
    [
        (".model_00001_.safetensors.0123abcd.partial", b"half", True),
        ("part-000000.safetensors.0123abcd.partial", b"half", True),
        (".tmpAbc123", safetensors_of({"qsched": "{}"}), True),
        (".tmpAbc123", safetensors_of({"format": "pt"}), False),
        (".tmpAbc123", b"another program's", False),
        ("film.partial", b"another program's", False),
        ("film.mkv.0123abcd.partial", b"another program's", False),
        ("letter.json.0123abcd.partial", b"another program's", False),
    ],
)
def test_files_of_earlier_versions_go_after_a_day_and_no_others(tmp_path, name, data, goes):
    path = tmp_path / name
    path.write_bytes(data)
    aged(path, 7200)
    assert remove_abandoned(tmp_path) == 0
    aged(path, 90_000)
    assert remove_abandoned(tmp_path) == (len(data) if goes else 0)
    assert path.exists() != goes


def test_folders_below_are_cleaned_where_it_is_asked_for(tmp_path):
    (tmp_path / "sub").mkdir()
    path = left_behind(tmp_path / "sub")
    aged(path, 4000)
    assert remove_abandoned(tmp_path) == 0
    assert remove_abandoned(tmp_path, deep=True) == 4


@pytest.mark.parametrize("name", ["diary.txt", "data.old", ".tmp"])
@pytest.mark.parametrize("lock", [True, False])
def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path, name, lock):
    path = left_behind(tmp_path)
    (path / name).write_text("someone's")
    if not lock:
        (path / "lock").unlink()
    aged(path, 10**6)
    assert remove_abandoned(tmp_path, deep=True) == 0
    assert (path / name).exists() and (path / "data").exists()


@pytest.mark.parametrize("name", ["data", "lock", ".tmpAbc123"])
def test_a_folder_within_a_workspace_is_nobody_s_leftover(tmp_path, name):
    path = left_behind(tmp_path)
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    (path / name / "diary.txt").write_text("someone's")
    aged(path, 10**6)
    assert remove_abandoned(tmp_path) == 0
    assert (path / name / "diary.txt").exists()


def test_what_the_library_left_in_a_workspace_goes_with_it(tmp_path):
    path = left_behind(tmp_path)
    (path / ".tmpAbc123").write_bytes(b"half")
    aged(path, 4000)
    assert remove_abandoned(tmp_path) == 8


def test_a_lock_that_is_a_link_harms_no_other_file(tmp_path):
    path, other = left_behind(tmp_path), tmp_path / "other"
    other.write_text("someone's")
    (path / "lock").unlink()
    try:
        (path / "lock").symlink_to(other)
    except OSError:
        pytest.skip("links are not allowed here")
    aged(path, 10**6)
    os.utime(other, (time.time() - 10**6,) * 2)
    assert remove_abandoned(tmp_path) == 0
    assert other.read_text() == "someone's"


def test_a_link_is_not_followed(tmp_path):
    real = left_behind(tmp_path)
    aged(real, 10**6)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = real.rename(elsewhere / "kept")
    try:
        real.symlink_to(moved, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    assert remove_abandoned(tmp_path, deep=True) == 0
    assert (moved / "data").exists()


def test_a_cleaner_that_is_quicker_is_evaded(tmp_path, monkeypatch):
    real, calls = workspace._locked, []

    def first_time_late(folder):
        calls.append(folder)
        return None if len(calls) == 1 else real(folder)

    monkeypatch.setattr(workspace, "_locked", first_time_late)
    with Workspace(tmp_path, "a") as work:
        work.data.write_text("x")
        assert list(tmp_path.iterdir()) == [work.path] and len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_two_that_finish_at_once_get_two_names(tmp_path):
    names = [tmp_path / f"model_{i}" for i in range(3)]

    def write(place):
        place.write_text("first")
        write_whole(lambda other: other.write_text("second"), iter(names))

    assert write_whole(write, iter(names)) == names[1]
    assert [p.read_text() for p in names[:2]] == ["second", "first"]
    assert sorted(tmp_path.iterdir()) == names[:2]


SERVER = """
import sys; sys.path.append(sys.argv[1])
from pathlib import Path
from qsched_core.files import write_whole
folder = Path(sys.argv[2])
def counted():  # as ComfyUI numbers files
    while True:
        yield folder / f"m_{len(list(folder.glob('m_*'))) + 1:05}"
print("ready", flush=True)
sys.stdin.readline()
for i in range(15):
    text = f"{sys.argv[3]} {i}"
    print(write_whole(lambda place: place.write_text(text), counted()), text, sep="\\t", flush=True)
"""


@pytest.mark.parametrize("links", [True, False])
def test_servers_on_one_folder_overwrite_nothing(tmp_path, links):
    script = SERVER
    if not links:
        script = f"import os\ndef no(*_, **__): raise PermissionError\nos.link = no\n{SERVER}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = [
        subprocess.Popen([sys.executable, "-c", script, ROOT, str(tmp_path), name], **pipes)
        for name in "abc"
    ]
    try:
        assert [s.stdout.readline() for s in servers] == ["ready\n"] * 3
        for server in servers:
            server.stdin.write("\n")
            server.stdin.flush()
        told = [line.split("\t") for s in servers for line in s.communicate()[0].splitlines()]
    finally:
        for server in servers:
            server.kill()
    assert len({path for path, _ in told}) == len(told) == 45
    assert all(Path(path).read_text() == text for path, text in told)
    assert len(list(tmp_path.iterdir())) == 45
