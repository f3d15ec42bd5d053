"""Which database a shared study may use, and how to name it without its secrets.

A workflow may come from a stranger, who must not choose files, hosts or environment variables of
the machine that runs it.  So it names a study database by a plain name, or by a variable that the
server's owner set for this.  The command line is its user's own and takes any URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..optional import missing
from .errors import CalibrationError

ENVIRONMENT = "env:"
OWN_PREFIX = "QSCHED_"
ALLOW_URLS = "QSCHED_ALLOW_STORAGE_URLS"
# by database: Python packages that speak to it, SQLAlchemy's name of each, and the one to install
DRIVERS = {
    "postgresql": ({"psycopg": "psycopg", "psycopg2": "psycopg2"}, "psycopg[binary]"),
    "mysql": ({"pymysql": "pymysql", "MySQLdb": "mysqldb"}, "pymysql"),
}
# Other options name files of this machine, or let the database's server read them.
WORKFLOW_OPTIONS = frozenset({"sslmode"})
MAX_STORAGE, MAX_STUDY = 2000, 128
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
VARIABLE = re.compile(r"[A-Za-z0-9_]{1,64}")
HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")
WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# file names that are devices on Windows, with any ending
DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)))
)
NO_URL = (
    "storage is no database URL; write for example postgresql://user:password@host/database, or "
    "env:VARIABLE for a variable that has it"
)


@dataclass(frozen=True)
class Database:
    """A database that may be used: its URL, which is a secret, and what to call it in any text.

    ``file`` is set where it is a file of the pack's own, whose folder may have to be made.
    """

    url: str = field(repr=False)
    label: str
    file: Path | None = None


@dataclass(frozen=True)
class StorageRule:
    """What may name a database.

    ``folder``: where the files of plain names lie, None where a plain name means nothing.
    ``prefix``: how the environment variables that may be named begin.
    ``urls``: whether network databases may be written out, ``files``: whether SQLite ones may.
    ``trusted``: whether their options and hosts are accepted unchecked.
    """

    folder: Path | None = None
    prefix: str = ""
    urls: bool = True
    files: bool = True
    trusted: bool = True

    def database(self, storage: str) -> Database | None:
        """The database that ``storage`` names, None for an empty text; connects to nothing.

        CalibrationError says what may be written instead, and shows nothing that may be secret.
        """
        if not isinstance(storage, str):
            raise CalibrationError(f"storage must be text, not {type(storage).__name__}")
        long = len(storage) > MAX_STORAGE
        text = "" if long else storage.strip()
        if not text and not long:
            return None
        if long or (not self.trusted and not storage.isprintable()):
            raise CalibrationError(
                f"storage may have {MAX_STORAGE} characters at most, and no control characters; "
                f"{self._instead()}"
            )
        if text.startswith(ENVIRONMENT):
            return self._variable(text.removeprefix(ENVIRONMENT))
        if "://" in text:
            return self._written(text)
        if self.folder is None:
            raise CalibrationError(NO_URL)
        return self._named(text)

    def _instead(self) -> str:
        return (
            f"write env:{self.prefix}STORAGE for a variable of the server that has the database's "
            "URL, or a plain name such as my-studies for a file of this machine, or nothing"
            if self.folder is not None
            else "write a database URL, or env:VARIABLE for a variable that has it"
        )

    def _named(self, name: str) -> Database:
        if not NAME.fullmatch(name) or name.partition(".")[0].lower() in DEVICES:
            raise CalibrationError(
                "storage is no plain name (64 letters, digits, - _ . at most, no dot in front, no "
                f"folders); {self._instead()}"
            )
        file = self.folder.absolute() / f"{name}.db"
        return Database(_file_url(file), f"{file.parent.name}/{file.name}", file)

    def _variable(self, name: str) -> Database:
        if not VARIABLE.fullmatch(name) or not name.startswith(self.prefix):
            raise CalibrationError(
                "storage: env: must be followed by an environment variable's name"
                + (f" that begins with {self.prefix}" if self.prefix else "")
                + f"; {self._instead()}"
            )
        label = f"{ENVIRONMENT}{name}"
        held = os.environ.get(name, "").strip()
        if not held:
            raise CalibrationError(
                f"storage={label!r}: the environment variable {name} is not set where this runs"
            )
        try:
            url = _parsed(held)
        except CalibrationError:
            raise CalibrationError(
                f"storage={label!r}: the environment variable {name} holds no database URL; it must "
                "be like postgresql://user:password@host/database, with %40 for @ in a password"
            ) from None
        return Database(_with_driver(url, label), label)

    def _written(self, text: str) -> Database:
        scheme = text.partition("://")[0].partition("+")[0].lower()
        allowed = self.files if scheme == "sqlite" else self.urls
        if not allowed:
            owner = (
                "" if scheme == "sqlite" else f", or let the server's owner set {ALLOW_URLS}=1, "
                "which trusts every workflow with the network"
            )  # fmt: skip
            raise CalibrationError(
                "storage: a workflow may not write out a database's URL, it could reach any file "
                f"or host of this server; {self._instead()}{owner}"
            )
        url = _parsed(text)
        if not self.trusted:
            self._check_network(url)
        return Database(_with_driver(url, spoken(url)), spoken(url))

    def _check_network(self, url) -> None:
        """No sockets, files or options of this machine in a stranger's URL."""
        drivers = DRIVERS.get(url.get_backend_name(), ({}, ""))[0].values()
        named = url.drivername.partition("+")[2]
        plain = HOST.fullmatch(url.host or "") and WORD.fullmatch(url.database or "")
        options = sorted(set(url.query) - WORKFLOW_OPTIONS)
        if not plain or options or (named and named not in drivers):
            raise CalibrationError(
                "storage: a workflow's URL must be scheme://user:password@host/database, without "
                f"options but {', '.join(WORKFLOW_OPTIONS)}; {self._instead()}"
            )


COMMAND_LINE = StorageRule()


def workflow_rule(folder: Path, environment: Mapping[str, str] = os.environ) -> StorageRule:
    """What a workflow may name, with the files of plain names in ``folder``."""
    allowed = environment.get(ALLOW_URLS) == "1"
    return StorageRule(folder, OWN_PREFIX, urls=allowed, files=False, trusted=False)


def checked_study(study: str) -> str:
    """The study's name without spaces around it; CalibrationError for one that can't be a name."""
    if not isinstance(study, str):
        raise CalibrationError(f"study must be text, not {type(study).__name__}")
    name = study.strip(" ") if len(study) <= MAX_STORAGE else study
    if len(name) > MAX_STUDY:
        raise CalibrationError(
            f"study has {len(name)} characters; write a name of {MAX_STUDY} at most"
        )
    if not name.isprintable():
        raise CalibrationError(
            f"study={name[:40]!a} has control characters; write a name of visible characters"
        )
    return name


def check_shared(database: Database, study: str) -> str:
    """The study's name in ``database``; CalibrationError where it has none."""
    name = checked_study(study)
    if not name:
        raise CalibrationError(
            f"study is empty; with storage={database.label!r} give the name under which the "
            "servers find each other"
        )
    return name


def spoken(url) -> str:
    """Scheme, host and database of a SQLAlchemy URL; "..." for what may be part of a secret.

    A password with an unescaped @ or / makes a URL that is read wrongly: then what looks like the
    host may not be one.
    """
    scheme, host, database = url.get_backend_name(), url.host or "", url.database or ""
    if scheme == "sqlite":
        return f"sqlite:///{database}" if database.isprintable() else "sqlite:///..."
    if (host and not HOST.fullmatch(host)) or (database and not WORD.fullmatch(database)):
        return f"{scheme}://..."
    return f"{scheme}://{f'[{host}]' if ':' in host else host}/{database}"


def _parsed(text: str):
    """SQLAlchemy's URL of a database that can hold studies; CalibrationError without the text."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise CalibrationError(NO_URL) from None
    if url.get_backend_name() not in (*DRIVERS, "sqlite"):
        raise CalibrationError(f"{NO_URL} (postgresql, mysql and sqlite can be used)")
    return url


def _with_driver(url, label: str) -> str:
    # Which driver a bare scheme means depends on SQLAlchemy's version: take one that is there.
    database = url.get_backend_name()
    if database != "sqlite" and "+" not in url.drivername:
        packages, install = DRIVERS[database]
        there = [name for package, name in packages.items() if missing(package, "", "") is None]
        if not there:
            raise CalibrationError(missing(next(iter(packages)), f"storage={label!r}", install))
        url = url.set(drivername=f"{database}+{there[0]}")
    return url.render_as_string(hide_password=False)


def _file_url(file: Path) -> str:
    from sqlalchemy.engine import URL, make_url

    url = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
    if make_url(url).database != str(file):  # SQLAlchemy before 2.1 takes what is after a ?
        raise CalibrationError(
            f"studies can't be kept in the folder {file.parent}: a database's URL can't have that "
            "name; choose a user folder without ? and %"
        )
    return url
