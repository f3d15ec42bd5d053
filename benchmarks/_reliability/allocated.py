"""A custom node that tells how much memory a ComfyUI server has allocated; soak.py puts it into one.

Counted is what malloc gave out and did not get back.  Resident memory is no measure of a leak: the
pages that malloc holds in reserve come and go by tens of MB with nothing in them.
"""

from __future__ import annotations

import ctypes
import gc
import sys

ROUTE = "/qsched_bench/allocated"


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def allocated() -> dict[str, float] | None:
    """MB in use, and MB that malloc has for blocks below its threshold; None without glibc 2.33."""
    if not sys.platform.startswith("linux"):
        return None
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    gc.collect()
    found = mallinfo2()
    return {"used": (found.uordblks + found.hblkhd) / 1e6, "heap": found.arena / 1e6}


def _serve() -> None:
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get(ROUTE)
    async def _answer(request):
        return web.json_response(allocated())


if "server" in sys.modules and hasattr(sys.modules["server"], "PromptServer"):  # within ComfyUI
    _serve()

NODE_CLASS_MAPPINGS: dict = {}
