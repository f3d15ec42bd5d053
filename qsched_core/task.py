"""A plain-torch model as something to calibrate and to evaluate, without a graph."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .precondition import ScalarCorrection
from .prompts import PromptSet
from .rollout import MEMO_BYTES, EvaluationMemo, rollout, tile
from .runner import Batches
from .search.precheck import Observed, observed
from .solvers import ModelFacts, check_sigmas, get_solver


class TaskError(ValueError):
    """A task that can't be found, or that is not one; the message says what to change."""


@dataclass(frozen=True)
class Task:
    """A few-step model and how its pictures are made.

    ``denoise(x, sigma, **extra)`` predicts the guided clean latent of latents x [n, ...] at sigma
    [n].  ``initial(seeds)`` gives the latents [n, ...] at the first of ``sigmas`` [steps + 1], each
    from its seed alone.  ``condition(prompts)`` gives ``extra``: tensors with a row a prompt are
    repeated for every candidate, anything else is passed as it is.  ``decode(latents)`` gives
    pictures [n, height, width, 3] in [0, 1].  ``provenance`` (plain JSON) fixes model and sampling:
    studies are told apart by it.  At most ``max_batch`` latents are in a batch.

    TaskError for a trajectory or solver that can't be run, and for a provenance that is empty.
    """

    denoise: Callable[..., torch.Tensor]
    initial: Callable[[Sequence[int]], torch.Tensor]
    condition: Callable[[Sequence[str]], Mapping[str, Any]]
    decode: Callable[[torch.Tensor], torch.Tensor]
    sigmas: Sequence[float]
    width: int
    height: int
    provenance: Mapping[str, Any]
    solver: str = "euler"
    options: Mapping[str, float] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=lambda: ModelFacts(True))
    max_batch: int = 32

    def __post_init__(self):
        if not self.provenance:
            raise TaskError("provenance is empty; say which model and weights the task has")
        try:
            check_sigmas(torch.tensor(list(self.sigmas), dtype=torch.float32))
            object.__setattr__(self, "options", get_solver(self.solver).check(dict(self.options)))
        except (TypeError, ValueError) as error:
            raise TaskError(f"the task can't be sampled: {error}") from None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def identity(self) -> ScalarCorrection:
        """c = 1 in every step."""
        return ScalarCorrection((1.0,) * self.steps, (1.0,) * self.steps)

    def describe(self) -> dict[str, Any]:
        """What fixes the pictures beside prompts, seeds and coefficients: plain JSON."""
        return {
            "model": dict(self.provenance),
            "sampling": {
                "solver": self.solver,
                "options": dict(self.options),
                "sigmas": [float(s) for s in self.sigmas],
                "flow": self.facts.flow,
                "width": self.width,
                "height": self.height,
            },
        }


class TaskRunner:
    """Pictures of many prompts under many corrections; ``model_evaluations`` counts their cost.

    ``memory`` bytes of model outputs are kept.
    """

    def __init__(self, task: Task, memory: int = MEMO_BYTES):
        self.task, self.width, self.height = task, task.width, task.height
        self.batches = Batches(task.max_batch, relieve=_relieve)
        self.model_evaluations = 0
        self._memo = EvaluationMemo(memory)

    @property
    def max_batch(self) -> int:
        """The most latents in a batch."""
        return self.batches.max_batch

    def images(
        self,
        prompts: PromptSet,
        corrections: Sequence[ScalarCorrection],
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Pictures [candidates, prompts, height, width, 3] in [0, 1] on the CPU.

        TaskError where the task's functions give something of another shape.
        """
        return self.batches.images(
            lambda part, few: self._images_of(part, few, on_step), prompts, corrections
        )

    def _start(self, prompts: PromptSet):
        """Initial latents, and the model with the prompts' conditioning."""
        task, count = self.task, len(prompts)
        x = task.initial(prompts.seeds)
        if len(x) != count:
            raise TaskError(f"initial gave {len(x)} latents for {count} seeds; give one a seed")
        extra = dict(task.condition(prompts.prompts))

        def model(x, sigma):
            times = len(x) // count
            spread = {
                k: tile(v, times) if isinstance(v, torch.Tensor) and len(v) == count else v
                for k, v in extra.items()
            }
            return task.denoise(x, sigma, **spread)

        return x, model

    def _sigmas(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(list(self.task.sigmas), dtype=torch.float32, device=x.device)

    @torch.no_grad()
    def observed(self, prompts: PromptSet, at: Observed | None = None) -> Observed:
        """The model at given latents, or along its own trajectory; all prompts are one batch."""
        x, model = self._start(prompts)
        task = self.task

        found = observed(
            model, x, self._sigmas(x), solver=task.solver, facts=task.facts,
            seeds=prompts.seeds, options=task.options, at=at,
        )  # fmt: skip
        self.model_evaluations += found.model_evaluations
        return found

    @torch.no_grad()
    def _images_of(self, prompts: PromptSet, corrections, on_step) -> torch.Tensor:
        task, count = self.task, len(prompts)
        x, model = self._start(prompts)
        result = rollout(
            model,
            x,
            self._sigmas(x),
            corrections,
            solver=task.solver,
            facts=task.facts,
            seeds=prompts.seeds,
            options=task.options,
            samples=tuple(zip(prompts.prompts, prompts.seeds, strict=True)),
            memo=self._memo,
            callback=None if on_step is None else lambda state: on_step(),
        )
        self.model_evaluations += result.evaluations
        images = task.decode(result.latents.flatten(0, 1)).float().cpu().clamp(0, 1)
        expected = (len(corrections) * count, task.height, task.width, 3)
        if images.shape != expected:
            raise TaskError(f"decode gave {list(images.shape)}; {list(expected)} was expected")
        return images.unflatten(0, (len(corrections), count))


def _relieve() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_task(spec: str, device: torch.device | str = "cpu") -> Task:
    """The task of ``module:function`` or ``file.py:function``, which is called with ``device``.

    TaskError names what is wrong with ``spec`` or with what the function gave; what the function
    itself raises passes through.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise TaskError(f"task={spec!r} must be module:function or file.py:function")
    function = getattr(_module(source, spec), name, None)
    if not callable(function):
        raise TaskError(f"task={spec!r}: there is no function {name!r} in {source}")
    try:
        inspect.signature(function).bind(device)
    except TypeError:
        raise TaskError(f"task={spec!r}: {name} must take one argument, the device") from None
    task = function(torch.device(device))
    if not isinstance(task, Task):
        raise TaskError(f"task={spec!r} gave {type(task).__name__}; return a qsched_core.task.Task")
    return task


def _module(source: str, spec: str):
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise  # something that the module itself needs
            raise TaskError(
                f"task={spec!r}: no module {source!r} here; run in the folder that holds it, or give "
                "its path"
            ) from None
    path = Path(source)
    if not path.is_file():
        raise TaskError(f"task={spec!r}: there is no file {path}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module  # dataclasses and the like look their module up
    found.loader.exec_module(module)
    return module
