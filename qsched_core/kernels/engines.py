"""Who unpacks codes on a device: the first engine of a list that has no reason not to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..devices import Place, place
from ..optional import missing
from .codes import GroupedCodes
from .operator import unpack

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PACKAGE = "triton-windows" if sys.platform == "win32" else "triton"


def _nothing(*_) -> None:
    return None


@dataclass(frozen=True)
class Engine:
    """``refusal`` says by what is known of a place and a dtype why it can't serve, ``trial`` by trying.

    Both give None where it can.
    """

    name: str
    refusal: Callable[[Place, torch.dtype], str | None] = _nothing
    trial: Callable[[torch.device], str | None] = _nothing


def _no_triton(at: Place, dtype: torch.dtype) -> str | None:
    if at.type != "cuda":
        return f"the Triton kernel is for NVIDIA GPUs; found {at}"
    if not at.at_least(8, 0):
        return f"Triton needs an sm_80 or newer GPU; found {at}"
    if dtype not in DTYPES:
        return f"the Triton kernel gives fp16, bf16 or fp32, not {dtype}"
    return missing("triton", "the fast kernel for packed weights", PACKAGE)


@lru_cache(maxsize=16)
def _try_triton(device: torch.device) -> str | None:
    """Unpack one group; Triton compiles its launcher with the machine's C compiler, if it has one."""
    codes = torch.tensor([[0b00011011] * 8], dtype=torch.uint8, device=device)
    scale = torch.tensor([[0.5]], dtype=torch.float16, device=device)
    two = torch.tensor(2.0, device=device)
    for levels in ((0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.5, 3.0)):  # counted, and looked up
        spec = GroupedCodes(2, levels)
        try:
            values = unpack(spec, codes, scale, two, None, 32, torch.float16)[0].tolist()
        except Exception as error:  # whatever its compilers raise
            return f"Triton does not work here ({type(error).__name__}: {error})"
        if values != [*levels] * 8:
            return "Triton gives wrong values here"
    return None


# Torch comes last: it serves everywhere, and is what the others are held against.
ENGINES = (Engine("triton", _no_triton, _try_triton), Engine("torch"))


def choose(
    at: Place, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[str, dict[str, str]]:
    """The engine for a place, and why those that would be faster don't serve.

    With a ``device``, which is the place, an engine must pass its trial there too.
    """
    refused: dict[str, str] = {}
    for entry in ENGINES:
        reason = entry.refusal(at, dtype)
        if reason is None and device is not None:
            reason = entry.trial(device)
        if reason is None:
            return entry.name, refused
        refused[entry.name] = reason
    raise RuntimeError(f"no engine serves {at}: {refused}")


@lru_cache(maxsize=64)
def _chosen(device: torch.device, dtype: torch.dtype) -> str:
    name, refused = choose(place(device), dtype, device)
    if device.type == "cuda":
        for other, reason in refused.items():
            logger.warning("%s unpacks weights instead of %s: %s", name, other, reason)
    return name


@torch.compiler.assume_constant_result
def engine(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the engine on ``device``; on a GPU the reason is logged, once, if it is torch."""
    return _chosen(device, dtype)
