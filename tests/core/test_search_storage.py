"""Which databases a workflow may name, and that none of their secrets is ever shown."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qsched_core.study import COMMAND_LINE, CalibrationError, check_shared, workflow_rule
from qsched_core.study import shared as shared_module
from qsched_core.study.database import MAX_STUDY, checked_study
from qsched_core.study.shared import SharedStore

pytest.importorskip("sqlalchemy", reason="shared studies need sqlalchemy")
FOLDER = Path("user/qsched/studies").absolute()
CLOSED, OPEN = workflow_rule(FOLDER, {}), workflow_rule(FOLDER, {"QSCHED_ALLOW_STORAGE_URLS": "1"})
SECRET = "5ecretw0rd"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(shared_module, "PATIENCE", (0.01,))


@pytest.mark.parametrize("name", ["studies", "my-studies", "v1.2_b", "7", "-", "a..b", "a" * 64])
@pytest.mark.parametrize("rule", [CLOSED, OPEN])
def test_a_plain_name_is_a_file_in_the_folder_of_studies(rule, name):
    database = rule.database(f" {name} ")
    assert database.file == FOLDER / f"{name}.db"
    assert database.url.startswith("sqlite:///") and database.url.endswith(f"studies/{name}.db")
    assert str(FOLDER.parent) not in database.label and name in database.label


def test_nothing_is_no_database():
    assert CLOSED.database("") is None and COMMAND_LINE.database("  ") is None


HOSTILE = [
    "..", ".", ".hidden", "../evil", "..\\evil", "/etc/passwd", "C:evil", "C:\\evil", "a/b", "a\\b",
    "~", "~root", "a b", "a\tb", "a\nb", "a\x00b", "\x1b[31mred", "a" * 65, "nul", "NUL.x", "com1",
    "stud\u00edes", "\uff0e\uff0e\uff0fevil", "a\u2215b", "a\u202etxt", "a\u200bb", "\u212a", "\u0661",
    "a\ud800", "%2e%2e%2fevil", "file:evil", "a?mode=memory", "a#b", ":memory:", "a;b", "a$HOME", "$HOME",
    "sqlite:///x.db", "sqlite:////etc/cron.d/x", "sqlite:////x/custom_nodes/evil.py", "sqlite://",
    "sqlite:///:memory:", "SQLITE:///x.db", "sqlite+pysqlite:////x.db", "sqlite:///file:/x?uri=true",
    "sqlite:///../x.db", "duckdb:////x", "oracle://u:p@h/d", "file:///etc/passwd", "http://10.0.0.1/",
    "redis://h", "://", "://h/d", "+://h/d", "postgresql:sqlite:////x", "env:postgresql://h/d",
    "env:", "env:PATH", "env:AWS_SECRET", "env:HOME", "env: QSCHED_URL", "env:qsched_URL",
    "env:QSCHED_URL/../PATH", "env:QSCHED_URL\x00", "env:$PATH", "env:env:QSCHED_URL", "ENV:PATH",
    "env\uff1aQSCHED_URL", "env:\uff31SCHED_URL", "env:XQSCHED_URL", "env:PATH QSCHED_",
    "\u200benv:PATH", "env:QSCHED_" + "A" * 60, "[" * 40_000, "postgresql://" + "a:" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("storage", HOSTILE, ids=lambda text: ascii(text[:30]))
@pytest.mark.parametrize("rule", [CLOSED, OPEN], ids=["closed", "open"])
def test_a_workflow_names_no_file_variable_or_program_of_the_server(monkeypatch, rule, storage):
    for name in ("PATH", "AWS_SECRET", "HOME", "XQSCHED_URL", "QSCHED_" + "A" * 60):
        monkeypatch.setenv(name, f"postgresql://u:{SECRET}@h/d")
    started = time.perf_counter()
    with pytest.raises(CalibrationError) as refused:
        rule.database(storage)
    assert time.perf_counter() - started < 0.05
    assert SECRET not in str(refused.value) and "storage" in str(refused.value)


PIECES = ["..", "/", "\\", ".", "env:", "QSCHED_URL", "PATH", "sqlite", "://", "/etc/x", "\x00", "\u202e",
          "postgresql", "mysql+pymysql", "@", ":", "?", "host", "?host=/run", "a", "\u00e9", " "]  # fmt: skip


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)))
@example("sqlite:////etc/passwd")
@example("env:QSCHED_URL")
def test_whatever_a_workflow_says_it_gets_its_folder_or_the_owners_database(storage):
    os.environ["QSCHED_URL"] = "sqlite:////the/owners.db"
    try:
        database = CLOSED.database(storage)
    except CalibrationError:
        return
    finally:
        del os.environ["QSCHED_URL"]
    if database is None:
        assert not storage.strip()
    elif database.file is None:
        assert database.label == "env:QSCHED_URL" == storage.strip()
    else:
        assert (
            database.file.parent == FOLDER
            and Path(os.path.normpath(database.file)) == database.file
        )


@pytest.mark.parametrize("url", ["postgresql://u:p@h/d", "mysql+pymysql://h/d", "PostgreSQL://h/d"])
def test_an_old_workflow_with_a_url_hears_what_to_write_instead(url):
    with pytest.raises(CalibrationError, match=r"env:QSCHED_STORAGE.*plain name.*QSCHED_ALLOW_S"):
        CLOSED.database(url)
    with pytest.raises(CalibrationError, match=r"env:QSCHED_STORAGE.*plain name") as refused:
        OPEN.database("sqlite:////x/y.db")
    assert "ALLOW" not in str(refused.value)  # that would not help


def test_where_the_owner_allows_it_a_workflow_may_write_a_network_url():
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://u:p@h.example:5432/d?sslmode=require"
    assert OPEN.database(url).url == url
    assert OPEN.database(url).label == "postgresql://h.example/d"
    for value in ("0", "true", "", " 1"):
        with pytest.raises(CalibrationError, match="may not write out"):
            workflow_rule(FOLDER, {"QSCHED_ALLOW_STORAGE_URLS": value}).database(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg:///d",  # the local socket, as the server's own user
        "postgresql+psycopg://u@/d?host=/var/run/postgresql",
        "postgresql+psycopg://u@h/d?passfile=/root/.pgpass",
        "postgresql+psycopg://u@h/d?sslkey=/root/key",
        "postgresql+psycopg://u@h/d?service=x",
        "postgresql+psycopg://u@%2Fvar%2Frun/d",
        "postgresql+psycopg://u@h/host=evil user=x",
        "mysql+pymysql://u@h/d?local_infile=1",
        "mysql+pymysql://u@h/d?read_default_file=/root/.my.cnf",
        "mysql+pymysql://u@h/d?unix_socket=/run/mysqld.sock",
        "postgresql+asyncpg://u@h/d",
    ],
)
def test_not_even_then_sockets_files_or_drivers_of_its_choice(url):
    with pytest.raises(CalibrationError, match="a workflow's URL must be"):
        OPEN.database(url)


def test_the_command_line_is_its_users_own(monkeypatch, tmp_path):
    pytest.importorskip("psycopg")
    assert COMMAND_LINE.database(f"sqlite:///{tmp_path}/x.db").label == f"sqlite:///{tmp_path}/x.db"
    assert COMMAND_LINE.database("postgresql://u@/d?host=/run").url.endswith("host=%2Frun")
    monkeypatch.setenv("MY_URL", "postgresql://u:p@h/d")
    assert COMMAND_LINE.database("env:MY_URL").label == "env:MY_URL"
    with pytest.raises(CalibrationError, match="no database URL"):
        COMMAND_LINE.database("nonsense")


# Secrets

LEAKY = [
    "postgresql://{s}:x@h/d", "postgresql://u:{s}@h/d", "postgresql://h/d?password={s}",
    "postgresql://h/d?token={s}&passfile={s}", "postgresql://u:a@{s}@h/d", "postgresql://u:a/{s}@h/d",
    "postgresql://u:a:{s}@h/d", "postgresql://u:{s}", "postgresql://u:{s}/d", "postgresql://u:a#{s}@h/d",
    "postgresql://u/x:{s}@h/d", "postgresql://u:x@h/d@{s}", "postgresql://u:a?{s}@h/d",
    "postgresql://u:x@h:{s}/d", "postgresql://u:x@[{s}/d", "mysql://u:%zz{s}@h/d", "mysql://h/d?ssl_key={s}",
    "sqlite:///x.db?key={s}", "sqlite+pysqlcipher://:{s}@/x.db", "{s} ", "{s}://h/d", "u:{s}@h/d", "user={s}",
    "postgresql+{s}://h/d", "postgresql:// {s}", "postgresql://u:x@h/d\n{s}",
]  # fmt: skip


@pytest.mark.parametrize("url", LEAKY)
@pytest.mark.parametrize("place", ["command line", "allowed workflow", "workflow", "variable"])
def test_no_text_has_more_of_a_url_than_scheme_host_and_database(monkeypatch, url, place):
    url = url.format(s=SECRET)
    if url.strip() == SECRET and "workflow" in place:
        url += "/"  # else it is a plain name
    monkeypatch.setenv("QSCHED_URL", url)
    rule = {"command line": COMMAND_LINE, "allowed workflow": OPEN}.get(place, CLOSED)
    try:
        database = rule.database("env:QSCHED_URL" if place == "variable" else url)
        seen = f"{database!r}"
        with pytest.raises(CalibrationError) as nameless:
            check_shared(database, "")
        seen += str(nameless.value)
    except CalibrationError:
        seen = traceback.format_exc()
    assert SECRET not in seen


def test_a_variables_url_is_spoken_of_by_its_name_alone(monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setenv("QSCHED_URL", f"postgresql://{SECRET}:{SECRET}@{SECRET}/{SECRET}")
    database = CLOSED.database("env:QSCHED_URL")
    store = SharedStore(database, "x", {})
    assert database.label == "env:QSCHED_URL" and SECRET in database.url
    assert SECRET not in f"{database!r} {store.where}"


class Talker:
    """Something that speaks PostgreSQL just well enough to refuse every login with a text."""

    def __init__(self, state: str, text: str):
        self.answer = f"SFATAL\0C{state}\0M{text}\0\0".encode()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.talk, daemon=True).start()

    def talk(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                while (asked := connection.recv(4096)) and asked[4:8] == b"\x04\xd2\x16\x2f":
                    connection.sendall(b"N")  # no encryption
                length = (len(self.answer) + 4).to_bytes(4, "big")
                connection.sendall(b"E" + length + self.answer)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()


@pytest.mark.parametrize(
    ("state", "text", "says"),
    [
        ("28P01", "password authentication failed", "the user or the password was not accepted"),
        ("3D000", 'database "none" does not exist', "there is no database of that name"),
        ("53300", "sorry, too many clients already", "too many connections"),
        ("XX000", "no words known", "not known here"),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_what_the_other_side_says_is_not_relayed(monkeypatch, caplog, variable, state, text, says):
    pytest.importorskip("psycopg")
    caplog.set_level("DEBUG")
    with Talker(state, f"{text} {SECRET}") as talker:
        url = (
            f"postgresql://u{SECRET}:p{SECRET}@127.0.0.1:{talker.port}/d?application_name={SECRET}"
        )
        monkeypatch.setenv("QSCHED_URL", url)
        database = CLOSED.database("env:QSCHED_URL") if variable else COMMAND_LINE.database(url)
        with pytest.raises(CalibrationError, match=says) as refused, SharedStore(database, "x", {}):
            pass
    told = "".join(traceback.format_exception(refused.value))
    assert SECRET not in told + caplog.text and str(talker.port) not in str(refused.value)
    where = "env:QSCHED_URL" if variable else r"postgresql://127.0.0.1/d"
    assert f"can't connect to {where}: " in str(refused.value)


def test_a_host_that_refuses_is_told_from_one_that_does_not_exist():
    pytest.importorskip("psycopg")
    for host, says in (("127.0.0.1:9", "refused"), ("nowhere.invalid", "host's name is not known")):
        database = COMMAND_LINE.database(f"postgresql://u:{SECRET}@{host}/d")
        with pytest.raises(CalibrationError, match=says) as refused, SharedStore(database, "x", {}):
            pass
        assert SECRET not in "".join(traceback.format_exception(refused.value))


# Files


def test_the_folder_is_made_and_the_file_shared(tmp_path):
    for name in ("plain", "{SCHEMA_VERSION} {0.__class__}"):
        database = workflow_rule(tmp_path / name / "studies", {}).database("mine")
        assert not (tmp_path / name).exists()  # naming it makes nothing
        with SharedStore(database, "x", {"a": 1}) as one, SharedStore(database, "x", {"a": 1}):
            one.put("key", "value")
        assert [path.name for path in (tmp_path / name / "studies").iterdir()] == ["mine.db"]
        assert one.where == "study 'x' in studies/mine.db"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a?b", "a%41b"])
def test_a_folder_that_a_url_can_not_name_is_refused_or_used_as_it_is(tmp_path, name):
    try:
        database = workflow_rule(tmp_path / name, {}).database("mine")
    except CalibrationError as error:
        assert "choose a user folder" in str(error)
        return
    with SharedStore(database, "x", {}):
        assert (tmp_path / name / "mine.db").exists()


def test_another_programs_file_is_left_as_it_is(tmp_path):
    foreign = tmp_path / "mine.db"
    foreign.write_bytes(b"not a database at all" * 100)
    before = foreign.read_bytes()
    database = workflow_rule(tmp_path, {}).database("mine")
    with (
        pytest.raises(CalibrationError, match="no SQLite database"),
        SharedStore(database, "x", {}),
    ):
        pass
    assert foreign.read_bytes() == before


# Study names


@pytest.mark.parametrize(
    "study",
    [
        "a\nb",
        "a\x00b",
        "\x1b[2J",
        "a\u202eb",
        "a\u200bb",
        "a\ud800",
        "\ufeffa",
        "a\x7f",
        "a\u2028b",
        "a\t",
    ],
)
def test_a_study_has_no_control_characters(study):
    with pytest.raises(CalibrationError, match="control characters") as refused:
        checked_study(study)
    assert str(refused.value).isprintable() and str(refused.value).isascii()


def test_a_study_has_a_name_of_bounded_length(tmp_path):
    database = workflow_rule(tmp_path, {}).database("mine")
    assert check_shared(database, f" {'x' * MAX_STUDY} ") == "x" * MAX_STUDY
    assert (
        checked_study("Modell f\u00fcr Bilder, \u6a21\u578b (int2)")
        == "Modell f\u00fcr Bilder, \u6a21\u578b (int2)"
    )
    with pytest.raises(CalibrationError, match=f"{MAX_STUDY} at most"):
        check_shared(database, "x" * (MAX_STUDY + 1))
    for empty in ("", "  "):
        with pytest.raises(CalibrationError, match="study is empty"):
            check_shared(database, empty)


def test_what_a_database_says_of_a_study_is_shown_without_control_characters(tmp_path):
    database = workflow_rule(tmp_path, {}).database("mine")
    with SharedStore(database, "x", {"a": "\x1b[2J\u202e", "k\x1b" * 80: 1}):
        pass
    with pytest.raises(CalibrationError, match="begun with something else") as refused:  # noqa: SIM117
        with SharedStore(database, "x", {"a": "b"}):
            pass
    assert str(refused.value).isprintable()
