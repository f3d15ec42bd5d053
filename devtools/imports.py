"""Who imported what, and for how long: the lines of ``python -X importtime``, read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

VARIABLE = {"PYTHONPROFILEIMPORTTIME": "1"}  # the same as -X importtime
_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S.*)")


@dataclass(frozen=True)
class Imported:
    """A module, what it imported first, and the time of both together."""

    name: str
    seconds: float
    children: tuple[Imported, ...]

    def all(self) -> Iterator[Imported]:
        """This module and everything below it."""
        yield self
        for child in self.children:
            yield from child.all()


def imports_of(text: str, part: str) -> list[Imported]:
    """The outermost modules with ``part`` in their names, from a log that has such lines in it."""
    waiting: list[tuple[int, Imported]] = []  # a module's line comes after those of its children
    for match in map(_LINE.search, text.splitlines()):
        if match is None:
            continue
        depth, children = len(match[3]), []
        while waiting and waiting[-1][0] > depth:
            children.append(waiting.pop()[1])
        module = Imported(match[4], int(match[2]) / 1e6, tuple(reversed(children)))
        waiting.append((depth, module))

    def outermost(modules) -> Iterator[Imported]:
        for module in modules:
            if part in module.name:
                yield module
            else:
                yield from outermost(module.children)

    return list(outermost(module for _, module in waiting))
