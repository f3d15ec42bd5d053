"""Texts that a workflow could carry to hold a server up: for the benchmark and the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

SIZE = 40_000  # characters: what once took half a minute
LARGE = 2_000_000
_UNITS = {
    "brackets": "[", "braces": "{", "parentheses": "(", "closed": "[]", "stars": "*", "marks": "?",
    "pluses": "+", "semicolons": ";", "bars": "|", "equals": "=", "commas": ",", "colons": ":",
    "quotes": '"', "backslashes": "\\", "slashes": "/", "dots": ".", "parents": "../", "lines": "\n",
    "letters": "a", "words": "a ", "spaces": " ", "tabs": "\t", "nines": "9", "nul": "\x00",
    "surrogates": "\ud800", "overrides": "\u202e", "emoji": "\U0001f600", "separators": "\u2028",
    # Marks out of their canonical order: sorting them takes the square of their number.
    "marks above and below": "\u0315\u0300", "clauses": "a=nf4;", "patterns": "a|", "globs": "*a",
    "sets": "[a]*", "open sets": "*[", "terms": "clip+", "weights": "2*clip+", "spaced": "clip + ",
    "percent": "%", "numbers": "1e999,", "objects": '{"a":', "lists": "[[],", "strings": '"a",',
}  # fmt: skip


def texts(size: int = SIZE) -> Iterator[tuple[str, str]]:
    """(name, text of about ``size`` characters): one unit over and over, alone and after a letter."""
    for name, unit in _UNITS.items():
        text = unit * (size // len(unit))
        yield name, text
        yield f"{name} after a letter", f"a{text}"
    yield "distinct lines", "\n".join(f"{i:x}" for i in range(size // 6))
    yield "distinct strings", json.dumps([f"{i:x}" for i in range(size // 9)])
    yield "distinct terms", "+".join(f"{i}*clip" for i in range(size // 10))
    yield "a nested list", "[" * (size // 2) + "]" * (size // 2)
    yield "a long number", "9" * size


def layer_overrides(last: str) -> Iterator[tuple[str, str]]:
    """Overrides that may be read, and are costly to match; ``last`` is a layer that is found late."""
    yield "many patterns of the last layer", "|".join([last] * 400)[:16000] + "=nf4"
    glob = f"*{'*'.join(last[:14])}*"
    yield "many globs of the last layer", ";".join([f"{glob}=nf4"] * (16000 // (len(glob) + 5)))
    yield "long globs", ";".join([f"{'*a' * 8}{'b' * 239}=nf4"] * 60)
    yield "long sets", ";".join([f"{'[' * 16}{'b' * 240}=nf4"] * 60)
    yield "sets of every letter", ";".join([f"{'[!-~]*' * 8}{'?' * 0}=nf4"] * 250)


def schedules() -> Iterator[tuple[str, str]]:
    """JSON that begins as a schedule does and goes on as none does."""
    head = {"format": "qsched", "version": 1, "solver": "euler", "flow": True}
    lists = {
        "sigmas": [1.0, 0.0],
        "correction": {"kind": "scalar", "c_x": [1.0], "c_eps": [1.0]},
    }
    units = (
        "[]",
        "1",
        "1.5",
        "0.12345678901234567",
        "{}",
        '{"":1}',
        '""',
        "9" * 4300,
        "1e999",
        "[[[]]]",
    )
    for unit in units:
        for parts in (12_000, 100_000):
            count = min(
                parts // (1 + unit.count("[") + unit.count("{")), 500_000 // (len(unit) + 1)
            )
            inner = ",".join([unit] * count)
            whole = json.dumps({**head, **lists, "provenance": "@"})
            yield f"{count} of {unit[:20]}", whole.replace('"@"', f'{{"a":[{inner}]}}')
            whole = json.dumps({**head, **lists, "sigmas": "@"})
            yield f"{count} sigmas {unit[:20]}", whole.replace('"@"', f"[{inner}]")
    whole = json.dumps({**head, **lists, "provenance": "@"})
    for name, text in texts(500_000):
        yield f"a string of {name}", whole.replace("@", text)
        yield f"raw {name}", whole.replace('"@"', f'{{"a":{text}}}')
    keys = ",".join(f'"{i:020x}":1' for i in range(12_000))
    yield "many keys", whole.replace('"@"', f"{{{keys}}}")
    yield "a long number", whole.replace('"@"', f'{{"a":{"9" * 500_000}}}')
