"""Images of many prompts under many candidates, in batches that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from .prompts import PromptSet
from .trajectory import Candidate

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Makes pictures [candidates, prompts, height, width, 3] of one batch.
Make = Callable[[PromptSet, Sequence[Candidate]], torch.Tensor]


class Batches:
    """Batches of at most ``max_batch`` latents, halved when memory runs out.

    ``out_of_memory`` are the exceptions that mean it; ``relieve`` then frees what can be freed.
    ``max_batch`` is the size that fitted last.
    """

    def __init__(
        self,
        max_batch: int,
        out_of_memory: type[BaseException] | tuple[type[BaseException], ...] = (
            torch.OutOfMemoryError
        ),
        relieve: Callable[[], None] = lambda: None,
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1")
        self.max_batch, self.out_of_memory, self.relieve = max_batch, out_of_memory, relieve

    def images(
        self, make: Make, prompts: PromptSet, candidates: Sequence[Candidate]
    ) -> torch.Tensor:
        """Pictures [candidates, prompts, height, width, 3] from ``make``, a batch at a time.

        A batch takes as many prompts as fit, then as many candidates of those.  If memory runs out
        with a single latent, the exception is raised.
        """
        out: list[list[torch.Tensor]] = [[] for _ in candidates]
        start = 0
        while start < len(prompts):
            size = min(self.max_batch, len(prompts) - start)
            group = max(1, self.max_batch // size)
            part = prompts.part(start, start + size)
            try:
                made = [
                    make(part, candidates[k : k + group]) for k in range(0, len(candidates), group)
                ]
            except self.out_of_memory:
                self._halve()
                continue
            for candidate, pictures in enumerate(torch.cat(made)):
                out[candidate].append(pictures)
            start += size
        return torch.stack([torch.cat(parts) for parts in out])

    def each(
        self, work: Callable[[PromptSet, int], Result], prompts: PromptSet
    ) -> Iterator[tuple[int, Result]]:
        """What ``work`` gives for each batch of prompts and the number of its first; and that number."""
        start = 0
        while start < len(prompts):
            part = prompts.part(start, start + self.max_batch)
            try:
                found = work(part, start)
            except self.out_of_memory:
                self._halve()
                continue
            yield start, found
            start += len(part)

    def _halve(self) -> None:
        """Smaller batches from now on; inside a handler, whose exception goes on from a single one."""
        if self.max_batch == 1:
            raise
        self.max_batch = max(1, self.max_batch // 2)
        logger.warning("out of memory; continuing with batches of %d latents", self.max_batch)
        self.relieve()
