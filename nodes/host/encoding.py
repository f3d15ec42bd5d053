"""Prompts are encoded once: the conditioning is kept as long as ComfyUI's (0.30.0) CLIP lives."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...qsched_core.recent import Recent

KEPT_BYTES = 2**29  # of each text encoder: a prompt of SD3's 77 tokens x 4096 takes 1.2 MB

# ComfyUI hands one CLIP to many nodes: a search and the evaluations after it encode the same
# prompts.  The keys are weak: an entry goes when no node holds its CLIP any more.
_encodings: WeakKeyDictionary[Any, Recent[list]] = WeakKeyDictionary()


def encode(clip, text: str) -> list:
    """The conditioning that ``clip`` gives for ``text``; nobody may write into its tensors."""
    kept = _encodings.setdefault(clip, Recent(KEPT_BYTES))
    key = (text, *_state(clip))
    found = kept.get(key)
    if found is None:
        found = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        kept.put(key, found, _size(found))
    return found


def _state(clip) -> tuple[Hashable, ...]:
    """The settings on which a CLIP's answers depend.

    ComfyUI's nodes clone the CLIP before they change one; other packs may not.
    """
    patcher = getattr(clip, "patcher", None)
    return (
        getattr(clip, "layer_idx", None),
        getattr(patcher, "patches_uuid", None),
        repr(getattr(clip, "tokenizer_options", None)),
    )


def _size(conditioning: list) -> int:
    return sum(tensor.nbytes for tensor in _tensors(conditioning))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
