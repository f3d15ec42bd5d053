"""JSON of any length in a database's columns, which hold some tens of kilobytes each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# MySQL's text columns hold 65 535 bytes; JSON that is quoted in JSON takes at most twice its length.
PIECE, HEAD = 30_000, "in pieces"


def pieces(key: str, value: Any) -> list[tuple[str, Any]]:
    """``value`` by key, cut into pieces that every database's columns hold; the head comes last.

    Pieces are named by the content, so that two workers that write at once don't mix theirs.
    """
    text = json.dumps(value)
    if len(text) <= PIECE:
        return [(key, value)]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    parts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    named = [(f"{key} {digest} {i}", part) for i, part in enumerate(parts)]
    return [*named, (key, {HEAD: [digest, len(parts)]})]


def whole(attributes: Mapping[str, Any], key: str) -> Any:
    """The inverse of :func:`pieces`; None where there is nothing under ``key``.

    ValueError, LookupError or TypeError where a piece is missing or damaged.
    """
    value = attributes.get(key)
    if not isinstance(value, Mapping) or set(value) != {HEAD}:
        return value
    digest, count = value[HEAD]
    return json.loads("".join(attributes[f"{key} {digest} {i}"] for i in range(count)))
