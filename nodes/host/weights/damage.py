"""What a damaged file makes ComfyUI (0.30.0) raise, in an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management

from ....qsched_core.formats import FormatError
from ....qsched_core.text import plain, shown

# What ComfyUI raises for tensors that are missing, or of another shape than it takes for granted.
_RAISED = (
    RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip
# What a saved file says of itself, and the type that each of it has.
FIELDS = {
    "source": str, "source_hash": str, "format": str, "unquantized_bytes": int, "merged_patches": str,
    "rounding": dict,
}  # fmt: skip
_KINDS = {str: "text", int: "whole number", dict: "object"}


@contextmanager
def named(file: str) -> Iterator[None]:
    """Inside, what ComfyUI raises over the tensors of ``file`` is a FormatError that names it.

    The pack's own errors, the user's interrupt and a lack of memory are left as they are.
    """
    management = comfy.model_management
    try:
        yield
    except FormatError:
        raise
    except _RAISED as error:
        if management.is_oom(error):
            raise
        said = plain(" ".join(str(error).split()), 300)
        raise FormatError(
            f"{file} can't be loaded as a diffusion model ({type(error).__name__}: {said}); is it "
            "damaged, or of a kind that this ComfyUI does not know?"
        ) from error


def said_of_itself(metadata: Mapping[str, str] | None, key: str, file: str) -> dict:
    """The JSON object under ``key`` of a saved file's metadata, {} where there is none.

    FormatError names the file and what of it is no text or number as it was written.
    """
    text = (metadata or {}).get(key)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"{file}: {key!r} of its metadata is no JSON object; get the file again")
    for name, kind in FIELDS.items():
        value = found.get(name)
        if value is not None and type(value) is not kind:
            raise FormatError(
                f"{file}: {name!r} in {key!r} of its metadata is {shown(value)}, no "
                f"{_KINDS[kind]}; get the file again"
            )
    return found
