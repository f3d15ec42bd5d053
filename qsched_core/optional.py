"""Dependencies that only some features need, imported when one is used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .errors import plainly_named


@plainly_named
class MissingDependencyError(ImportError):
    """A feature's package is not installed; the message has the command that installs it."""


def missing(package: str, feature: str, install: str) -> str | None:
    """Why ``feature`` can't be used, with the command that helps; None if ``package`` is there."""
    try:
        found = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return None
    return (
        f"{feature} needs the package {package}, which is not installed; run: pip install {install}"
    )


def require(package: str, feature: str, install: str) -> ModuleType:
    """Import ``package``; MissingDependencyError with the reason of :func:`missing` if that fails."""
    reason = missing(package, feature, install)
    if reason:
        raise MissingDependencyError(reason)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{feature} needs the package {package}, which is installed but can not be imported "
            f"({error}); run: pip install --upgrade {install}"
        ) from error
