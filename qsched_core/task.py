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

from .errors import plainly_named
from .prompts import PromptSet
from .solvers import ModelInfo, get_solver
from .source import ModelSource, SourceError
from .trajectory import MEMO_BYTES, Trajectory, tile


@plainly_named
class TaskError(SourceError):
    """A task that can't be found, or something that is no task; the message says what to change."""


@dataclass(frozen=True)
class Task:
    """A few-step model and how its pictures are made.

    ``denoise(x, sigma, **extra)`` predicts the guided clean latent of latents x [n, ...] at sigma
    [n].  ``initial(seeds)`` gives the latents [n, ...] at the first of ``sigmas`` [steps + 1], each
    from its seed alone.  ``condition(prompts)`` gives ``extra``: tensors with a row a prompt are
    repeated for every candidate, anything else is passed as it is.  ``decode(latents)`` gives
    pictures [n, height, width, 3] in [0, 1].  ``provenance`` (plain JSON) says what the model is:
    studies are told apart by it; "source_hash" in it is of the weights before quantization, by which
    a reference is known to be the same model.  At most ``max_batch`` latents are in a batch.
    ``module`` is the torch module that ``denoise`` runs: rounding its weights needs it, nothing else.

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
    info: ModelInfo = field(default_factory=lambda: ModelInfo(True))
    max_batch: int = 32
    module: torch.nn.Module | None = None
    trajectory: Trajectory = field(init=False)

    def __post_init__(self):
        if not self.provenance:
            raise TaskError("provenance is empty; say which model and weights the task has")
        if self.module is not None and not isinstance(self.module, torch.nn.Module):
            raise TaskError(
                f"module is {type(self.module).__name__}; give a torch.nn.Module or None"
            )
        try:
            options = get_solver(self.solver).check(dict(self.options))
            trajectory = Trajectory.of(
                tuple(float(sigma) for sigma in self.sigmas), self.solver, self.info.flow, options
            )
        except (TypeError, ValueError) as error:
            raise TaskError(f"the task can't be sampled: {error}") from None
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "trajectory", trajectory)


class TaskSource(ModelSource):
    """A task's pictures; TaskError where its functions give something of another shape."""

    def __init__(self, task: Task, memory: int = MEMO_BYTES):
        self.task = task
        self._device = torch.device("cpu")
        super().__init__(
            task.trajectory,
            task.info,
            width=task.width,
            height=task.height,
            max_batch=task.max_batch,
            memory=memory,
            relieve=_relieve,
        )

    def sample(self, prompts: PromptSet, trajectory: Trajectory, copies: int, run) -> torch.Tensor:
        task, count = self.task, len(prompts)
        x = task.initial(prompts.seeds)
        self._device = x.device
        if len(x) != count:
            raise TaskError(f"initial gave {len(x)} latents for {count} seeds; give one a seed")
        if trajectory.sigmas[0] != task.trajectory.sigmas[0]:  # latents are noise times sigma
            x = x * (trajectory.sigmas[0] / task.trajectory.sigmas[0])
        extra = dict(task.condition(prompts.prompts))

        def model(x, sigma):
            times = len(x) // count
            spread = {
                k: tile(v, times) if isinstance(v, torch.Tensor) and len(v) == count else v
                for k, v in extra.items()
            }
            return task.denoise(x, sigma, **spread)

        return run(model, x, torch.tensor(trajectory.sigmas, dtype=torch.float32, device=x.device))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.task.decode(latents.to(self._device))

    def describe(self) -> dict[str, Any]:
        return {
            "model": dict(self.task.provenance),
            "sampling": {
                **self.trajectory.describe(),
                "width": self.width,
                "height": self.height,
            },
        }


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
                raise  # a module that the task's module imports is missing
            raise TaskError(
                f"task={spec!r}: no module {source!r} here; run in the folder that holds it, or give "
                "its path"
            ) from None
    path = Path(source)
    if not path.is_file():
        raise TaskError(f"task={spec!r}: there is no file {path}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module  # dataclasses look their module up in sys.modules
    found.loader.exec_module(module)
    return module
