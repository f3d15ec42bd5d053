"""What a user writes for a shared study's database: a URL, or where to find one."""

from __future__ import annotations

import os

from ..optional import missing
from .errors import CalibrationError

ENVIRONMENT = "env:"
# by database: Python packages that speak to it, SQLAlchemy's name of each, and the one to install
DRIVERS = {
    "postgresql": ({"psycopg": "psycopg", "psycopg2": "psycopg2"}, "psycopg[binary]"),
    "mysql": ({"pymysql": "pymysql", "MySQLdb": "mysqldb"}, "pymysql"),
}


def resolve(storage: str) -> str:
    """The database URL that ``storage`` means: itself, or the variable of ``env:VARIABLE``.

    CalibrationError for a variable that is not set, for what is no database URL, and where no
    driver of that database is installed.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    url = storage.strip()
    if url.startswith(ENVIRONMENT):
        name = url.removeprefix(ENVIRONMENT)
        url = os.environ.get(name, "").strip()
        if not url:
            raise CalibrationError(
                f"storage={storage!r}: the environment variable {name} is not set where this runs"
            )
    try:
        parsed = make_url(url)
        database = parsed.get_backend_name()
    except ArgumentError:
        database = ""
    if database not in (*DRIVERS, "sqlite"):
        raise CalibrationError(
            f"storage={hidden(url)!r} is no database URL; write for example "
            "postgresql://user:password@host/database, or env:VARIABLE for a variable that has it"
        )
    if database == "sqlite" or "+" in parsed.drivername:
        return url
    # Which driver a bare scheme means depends on SQLAlchemy's version: take one that is there.
    packages, install = DRIVERS[database]
    there = [name for package, name in packages.items() if missing(package, "", "") is None]
    if not there:
        raise CalibrationError(missing(next(iter(packages)), f"storage={hidden(url)!r}", install))
    chosen = parsed.set(drivername=f"{database}+{there[0]}")
    return chosen.render_as_string(hide_password=False)


def check_storage(storage: str, study: str) -> None:
    """CalibrationError where a shared study can't be there: URL, driver or name; connects to nothing."""
    resolve(storage)
    if not study.strip():
        raise CalibrationError(
            f"study is empty; with storage={hidden(storage)!r} give the name under which the "
            "servers find each other"
        )


def hidden(url: str) -> str:
    """The URL with its password hidden; what can't be read as one without all after its scheme."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        scheme, colon, _ = url.partition("://")
        return f"{scheme}{colon}..." if colon else url[:40]
