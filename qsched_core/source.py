"""Where pictures come from: a model on a trajectory, whatever runs it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from .batches import Batches
from .errors import plainly_named
from .objective import Scores
from .prompts import PromptSet
from .sigmas import divided
from .solvers import ModelInfo
from .text import plain
from .trajectory import (
    MEMO_BYTES,
    Candidate,
    EvaluationMemo,
    Observed,
    Trajectory,
    by_trajectory,
    observed,
    rollout,
)

logger = logging.getLogger(__name__)

SCORED_BYTES = 2**29  # pictures in memory at a time while they are scored
MOST_SHOWN = 120  # characters of a value in an error
# Of a model's description: hashes of the weights before quantization, and of the patches on them.
IDENTITY_KEYS = ("source_hash", "patches")

# ``run(model, x, sigmas, extra_args)`` gives final latents [copies * prompts, ...] for initial
# latents x [prompts, ...]; ``model(x, sigma, **extra_args)`` takes any multiple of them.
Run = Callable[
    [Callable[..., torch.Tensor], torch.Tensor, torch.Tensor, "dict | None"], torch.Tensor
]


# Gets a source's pictures [n, height, width, 3] of a candidate as they are scored.
OnPictures = Callable[["Source", Candidate, PromptSet, torch.Tensor], None]


@plainly_named
class SourceError(ValueError):
    """A source that can't make what is asked for; the message says what to change."""


class Source(Protocol):
    """Makes pictures of prompts under candidates, and counts its model evaluations.

    ``trajectory`` is its own one, ``nfe`` counts the latents that went through the model so far,
    ``max_batch`` is the largest batch in latents.
    """

    trajectory: Trajectory
    width: int
    height: int
    nfe: int

    @property
    def max_batch(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON that fixes the pictures beside candidates, prompts and seeds.

        "model" says what the model is, with its ``source_hash`` if there is one: the same for the
        quantized model and the unquantized one.  "sampling" is how it is sampled.
        """
        ...

    def images(
        self,
        prompts: PromptSet,
        candidates: Sequence[Candidate],
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Pictures [candidates, prompts, height, width, 3] in [0, 1] on the CPU.

        ``on_step()`` is called after every sampling step of a batch.
        """
        ...

    def observed(
        self,
        prompts: PromptSet,
        at: Observed | None = None,
        trajectory: Trajectory | None = None,
        on_evaluation: Callable[[float], None] = lambda sigma: None,
    ) -> Observed:
        """The model at given latents, or along ``trajectory`` (its own); all prompts are one batch.

        ``on_evaluation(sigma)`` is called before every model evaluation.
        """
        ...

    def fine(self, steps: int) -> Trajectory:
        """Euler's trajectory of so many steps, over the levels that its scheduler gives them."""
        ...


class Measure(Protocol):
    """What scores pictures: an Objective."""

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores: ...

    def describe(self) -> dict[str, Any]: ...


class ModelSource(ABC):
    """A source that runs a model; subclasses say how to sample and how to decode.

    Prompts and candidates share batches of at most ``max_batch`` latents.  A batch is halved when
    memory runs out: an exception of ``out_of_memory``, after which ``relieve`` frees what can be
    freed.  Candidates share the evaluations that they have in common: ``memory`` bytes of model
    outputs are kept.
    Prompts whose conditioning differs in shape are not batched: see :meth:`alike`.  Each picture is what the model gives for its prompt and seed alone, up to the rounding of a
    batched matrix product, in the 256 levels of a picture file: a saved picture scores the same.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        info: ModelInfo,
        *,
        width: int,
        height: int,
        max_batch: int,
        memory: int = MEMO_BYTES,
        out_of_memory: type[BaseException] | tuple[type[BaseException], ...] = (
            torch.OutOfMemoryError
        ),
        relieve: Callable[[], None] = lambda: None,
    ):
        self.trajectory, self.info = trajectory, info
        self.width, self.height = width, height
        self.batches = Batches(max_batch, out_of_memory, relieve)
        self.nfe = 0
        self._memo = EvaluationMemo(memory)

    @abstractmethod
    def sample(
        self, prompts: PromptSet, trajectory: Trajectory, copies: int, run: Run
    ) -> torch.Tensor:
        """Call ``run`` with the prompts' initial latents, conditioned model and sigmas.

        Gives its final latents [copies * prompts, ...]."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [n, height, width, 3] of latents [n, ...]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """See :class:`Source`."""

    def alike(self, prompts: PromptSet) -> list[list[int]]:
        """The places of prompts by what may be in one batch: all of them, where the source can."""
        return [list(range(len(prompts)))]

    def interrupted(self) -> None:  # noqa: B027  most sources can't be stopped in between
        """Called between steps: raises where the user wants to stop."""

    @property
    def max_batch(self) -> int:
        return self.batches.max_batch

    @torch.no_grad()
    def images(
        self,
        prompts: PromptSet,
        candidates: Sequence[Candidate],
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        out: list[torch.Tensor | None] = [None] * len(candidates)
        alike = self.alike(prompts)
        for group in by_trajectory(candidates):
            parts = [
                self.batches.images(
                    lambda part, few: self._made(part, few, on_step),
                    prompts.at(places),
                    [candidates[k] for k in group],
                )
                for places in alike
            ]
            for k, pictures in zip(group, _in_order(parts, alike, 1), strict=True):
                out[k] = pictures
        return torch.stack(out)

    def _made(self, prompts: PromptSet, candidates: Sequence[Candidate], on_step) -> torch.Tensor:
        """One batch: candidates of one trajectory."""

        def stepped(state) -> None:
            self.interrupted()
            if on_step is not None:
                on_step()

        def run(model, x, sigmas, extra_args=None):
            result = rollout(
                model,
                x,
                sigmas,
                candidates,
                info=self.info,
                seeds=prompts.seeds,
                samples=tuple(zip(prompts.prompts, prompts.seeds, strict=True)),
                memo=self._memo,
                extra_args=extra_args,
                callback=stepped,
            )
            self.nfe += result.nfe
            return result.latents.flatten(0, 1)

        latents = self.sample(prompts, candidates[0].trajectory, len(candidates), run)
        pictures = in_levels(self.decode(latents).cpu())
        expected = (len(candidates) * len(prompts), self.height, self.width, 3)
        if pictures.shape != expected:
            raise SourceError(
                f"decoding gave {list(pictures.shape)}; {list(expected)} was expected"
            )
        return pictures.unflatten(0, (len(candidates), len(prompts)))

    @torch.no_grad()
    def observed(
        self,
        prompts: PromptSet,
        at: Observed | None = None,
        trajectory: Trajectory | None = None,
        on_evaluation: Callable[[float], None] = lambda sigma: None,
    ) -> Observed:
        """See :class:`Source`; what is not alike is evaluated one kind after another."""
        alike = self.alike(prompts)
        parts = [
            self._observed(prompts.at(places), _rows(at, places), trajectory, on_evaluation)
            for places in alike
        ]
        latents, outputs = (
            tuple(
                _in_order(step, alike) for step in zip(*(getattr(p, n) for p in parts), strict=True)
            )
            for n in ("latents", "outputs")
        )
        return Observed(parts[0].sigmas, latents, outputs, sum(part.nfe for part in parts))

    def _observed(
        self, prompts: PromptSet, at: Observed | None, trajectory, on_evaluation
    ) -> Observed:
        """One batch."""
        found: list[Observed] = []
        along = trajectory or self.trajectory

        def run(model, x, sigmas, extra_args=None):
            def interruptible(x, sigma, **extra):
                self.interrupted()
                on_evaluation(float(sigma[0]))
                return model(x, sigma, **extra)

            found.append(
                observed(
                    interruptible,
                    x,
                    sigmas,
                    along,
                    info=self.info,
                    seeds=prompts.seeds,
                    at=at,
                    extra_args=extra_args,
                )
            )
            return x

        self.sample(prompts, along, 1, run)
        self.nfe += found[0].nfe
        return found[0]

    def fine(self, steps: int) -> Trajectory:
        """See :class:`Source`; without a scheduler the trajectory's own levels, divided further."""
        own = self.trajectory
        return Trajectory(divided(own.sigmas, steps, own.flow), own.flow)


def _in_order(parts: Sequence[torch.Tensor], places: Sequence[Sequence[int]], dim: int = 0):
    """Tensors of prompts at ``places`` as one, in the prompts' own order."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for each in places for place in each]).argsort()
    return torch.cat(list(parts), dim).index_select(dim, order)


def _rows(at: Observed | None, places: Sequence[int]) -> Observed | None:
    if at is None:
        return None
    return replace(
        at,
        latents=tuple(step[list(places)] for step in at.latents),
        outputs=tuple(step[list(places)] for step in at.outputs),
    )


def in_levels(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], float32, in the 256 levels of a picture file; NaN stays."""
    return images.float().clamp(0, 1).mul_(255).round_().div_(255)


def scored(
    source: Source,
    measure: Measure,
    candidates: Sequence[Candidate],
    prompts: PromptSet,
    on_step: Callable[[], None] | None = None,
    on_pictures: OnPictures | None = None,
) -> list[Scores]:
    """The scores of every candidate, made and scored in parts whose pictures fit memory.

    ``on_pictures(source, candidate, prompts, images)`` gets each part's pictures [n, height, width, 3].
    """
    picture = source.width * source.height * 3 * 4
    size = max(1, SCORED_BYTES // (picture * len(candidates)))
    parts: list[list[Scores]] = [[] for _ in candidates]
    for start in range(0, len(prompts), size):
        few = prompts.part(start, start + size)
        for k, images in enumerate(source.images(few, candidates, on_step)):
            parts[k].append(measure.score(images, few.prompts))
            if on_pictures is not None:
                on_pictures(source, candidates[k], few, images)
    return [Scores.join(each) for each in parts]


def check_reference(source: Source, reference: Source) -> None:
    """SourceError unless ``reference`` is the same model on the same trajectory, quantized or not.

    The same means: equal sampling, equal size, and equal hashes of the unquantized weights and of the
    patches on them, be they merged before the rounding or not.  What can't be compared is logged.
    """
    mine, other = source.describe(), reference.describe()
    one, two = source.trajectory, reference.trajectory
    for what, ours, theirs in (
        ("noise levels", one.sigmas, two.sigmas),
        ("kind of noise levels", one.flow, two.flow),
        ("solvers", one.solver, two.solver),
        ("options of its solvers", one.solvers, two.solvers),
        ("size of pictures", (source.width, source.height), (reference.width, reference.height)),
        ("sampling", mine.get("sampling"), other.get("sampling")),
    ):
        if ours != theirs:
            raise SourceError(
                f"the reference model has other {what} than the model ({plain(str(theirs), MOST_SHOWN)}, not "
                f"{plain(str(ours), MOST_SHOWN)}); connect the same model, not quantized, behind the same nodes"
            )
    models = [_identity(content.get("model")) for content in (mine, other)]
    for key in IDENTITY_KEYS:
        one, two = (model.get(key) for model in models)
        if one is None or two is None:
            logger.warning(
                "whether the reference is the same model can't be told: %s has no %s",
                "the model" if one is None else "the reference",
                key,
            )
            return
        same = one == two if key != "patches" else _same_patches(*models)
        if same is None:
            logger.warning(
                "whether the reference has the model's LoRAs can't be told: some are merged into "
                "weights, others are not"
            )
        elif not same:
            what = {"patches": "LoRAs or other patches"}.get(key, "weights")
            names = [plain(str(model.get("source") or "unnamed"), MOST_SHOWN) for model in models]
            raise SourceError(
                f"the reference model ({names[1]}) has other {what} than the model ({names[0]}); "
                "connect the same model, not quantized"
            )


def _identity(model: Any) -> Mapping[str, Any]:
    return model if isinstance(model, Mapping) else {}


def _same_patches(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool | None:
    """Whether two models have the same patches; None where it can't be told.

    Quantizing merges LoRAs into the weights: then they are on the reference alone.
    """
    (merged, left), (other_merged, other_left) = (
        (model.get("merged_patches") or "", model["patches"]) for model in (one, two)
    )
    if merged == other_merged:
        return left == other_left
    if (merged and left) or (other_merged and other_left):
        return None  # a hash is of all that was merged at once
    return (merged or left) == (other_merged or other_left)
