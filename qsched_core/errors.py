"""How the pack's errors are named."""

from __future__ import annotations

OURS = "qsched"  # what stands for the module of the pack's own errors


def plainly_named(error: type[Exception]) -> type[Exception]:
    """Named without its module: a page shows that name in front of the message.

    ComfyUI imports the pack by its folder's path, which would fill the line.
    """
    error.__module__ = OURS
    return error
