"""What a database's error means, in words of our own.

A driver's text may hold user names, hosts, parts of a URL, or whatever the other side sent.  It is
read here to tell the kind of failure, and goes no further: not into messages, nor into a log.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A kind of failure: what to say, and what it is known by.

    ``types`` are Python's exceptions, ``states`` beginnings of SQLSTATE, ``numbers`` MySQL's, and
    ``words`` parts of the lower-case text of libpq, PyMySQL and SQLite.
    """

    text: str
    types: tuple[type[BaseException], ...] = ()
    states: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()

    def fits(self, error: BaseException) -> bool:
        state = str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or "")
        number = error.args[0] if error.args else None
        text = str(error).lower()
        return (
            isinstance(error, self.types)
            or any(state.startswith(known) for known in self.states)
            or (isinstance(number, int) and number in self.numbers)
            or any(word in text for word in self.words)
        )


FAILURES = (
    Failure(
        "the user or the password was not accepted",
        states=("28",),
        numbers=(1044, 1045, 1698),
        words=(
            "authentication failed",
            "access denied",
            "no password supplied",
            "pg_hba",
            'role "',
        ),
    ),
    Failure(
        "the connection was refused; is the database running, and is the port right?",
        (ConnectionRefusedError,),
        words=("refused",),
    ),
    Failure(
        "the host's name is not known",
        (socket.gaierror,),
        numbers=(2005,),
        words=("translate host name", "resolve host", "name or service not known", "getaddrinfo"),
    ),
    Failure(
        "there is no database of that name",
        states=("3D",),
        numbers=(1049,),
        words=('database "', "unknown database"),
    ),
    Failure(
        "the file can't be opened; is its folder there, and may this user write in it?",
        words=("unable to open database file",),
    ),
    Failure("the file is no SQLite database", words=("not a database", "malformed")),
    Failure("another program has locked it", words=("locked",)),
    Failure("its disk is full", states=("53100",), numbers=(1021, 1114), words=("disk is full",)),
    Failure(
        "it has too many connections", states=("53300",), numbers=(1040, 1203), words=("too many",)
    ),
    Failure(
        "its user may not write there",
        (PermissionError,),
        states=("42501", "25006"),
        numbers=(1142,),
        words=("permission denied", "readonly", "read-only"),
    ),
    Failure("a value is too long for it", states=("22001",), numbers=(1406,), words=("too long",)),
    Failure("the encrypted connection failed", words=("ssl", "certificate")),
    Failure(
        "there was no answer in time", (TimeoutError,), words=("timeout", "timed out", "expired")
    ),
    Failure(
        "the connection was lost",
        (ConnectionError,),
        states=("57P", "08"),
        numbers=(2006, 2013, 4031),
        words=("server closed", "lost connection", "terminating", "broken pipe", "reset by peer"),
    ),
    Failure("its tables are of another version of Optuna", words=("optuna version",)),
    Failure(
        "the driver that the URL names is not installed",
        (ImportError,),
        words=("can't load plugin",),
    ),
    Failure(
        "the URL has an option or a value that the driver does not know",
        (TypeError, ValueError),
        words=("invalid connection option", "invalid dsn", "conninfo", "invalid sslmode"),
    ),
)


def failure(error: BaseException) -> str:
    """The kind of failure in a few words; of a kind not known here the exception's class."""
    causes = list(_causes(error))
    found = (kind.text for kind in FAILURES if any(kind.fits(cause) for cause in causes))
    return next(found, f"it failed in a way not known here ({type(causes[-1]).__name__})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "orig", None) or error.__cause__ or error.__context__
