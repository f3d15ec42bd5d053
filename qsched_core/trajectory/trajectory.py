"""Trajectory: the noise levels of a sampling run and the solver of each step, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..correction import DEFAULT, Correction
from ..sigmas import SIGMA_TOLERANCE, check_falling
from ..solvers import BoundSolver, ModelInfo, Solver, get_solver
from ..strict_json import take
from ..text import shown
from ..validation import ScheduleError, numbers


@dataclass(frozen=True)
class StepSolver:
    """A solver by name, and those of its options that are known; the others are its defaults.

    ScheduleError for a solver that is unknown, an option that it does not have, or one out of range.
    """

    name: str = "euler"
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ScheduleError(f"solver={shown(self.name)} must be a solver's name")
        try:
            solver = get_solver(self.name)
        except ValueError as error:
            known = str(error).partition("; ")[2]
            raise ScheduleError(f"solver={shown(self.name)} is unknown; {known}") from None
        if not isinstance(self.options, Mapping):
            raise ScheduleError(f"options={shown(self.options)} of {self.name} must be an object")
        try:
            checked = solver.check(dict(self.options))
        except ValueError as error:
            raise ScheduleError(str(error)) from None
        object.__setattr__(self, "options", {name: checked[name] for name in self.options})

    def __hash__(self):
        return hash((self.name, tuple(sorted(self.options.items()))))

    @property
    def solver(self) -> Solver:
        return get_solver(self.name)

    @property
    def learned(self) -> dict[str, float]:
        """Those options that only a search sets."""
        names = {option.name for option in self.solver.learned}
        return {name: value for name, value in self.options.items() if name in names}

    @property
    def label(self) -> str:
        """The name, with what was learned of the step, e.g. "dpmpp_2m (corrector 1, c_1 0.9)"."""
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.learned.items())
        return f"{self.name} ({told})" if told else self.name

    def bind(self, model: ModelInfo) -> BoundSolver:
        """The solver for a model; ValueError for what the model lacks shows when it is run."""
        return BoundSolver(self.solver, self.solver.bind(model, **self.options))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **({"options": dict(self.options)} if self.options else {})}

    @classmethod
    def from_json(cls, content: Any) -> StepSolver:
        if not isinstance(content, dict):
            raise ScheduleError(f"solver={shown(content)} must be an object with a name")
        take(content, "the solver", {"name"}, {"options"})
        return cls(content["name"], content.get("options", {}))


@dataclass(frozen=True)
class Trajectory:
    """Noise levels ``sigmas`` [steps + 1], falling, and the solver of each step.

    ``flow`` says whether sigma is the flow's time in [0, 1] (velocity models) or the noise's
    standard deviation (epsilon and v models).  A single solver stands for every step.  ScheduleError
    names the field that can't be.
    """

    sigmas: tuple[float, ...]
    flow: bool = True
    solvers: tuple[StepSolver, ...] = (StepSolver(),)

    def __post_init__(self):
        object.__setattr__(self, "sigmas", numbers("sigmas", self.sigmas))
        check_falling(self.sigmas)
        if not isinstance(self.flow, bool):
            raise ScheduleError(f"flow={shown(self.flow)} must be true or false")
        if self.flow and self.sigmas[0] > 1 + SIGMA_TOLERANCE:
            raise ScheduleError(
                f"sigmas starts at {self.sigmas[0]:.6g}; a flow model's sigma is at most 1"
            )
        solvers = tuple(self.solvers)
        if len(solvers) == 1:
            solvers *= self.steps
        if len(solvers) != self.steps:
            raise ScheduleError(
                f"solvers has {len(solvers)} entries for {self.steps} steps; give one a step, or one"
            )
        object.__setattr__(self, "solvers", solvers)

    @classmethod
    def of(
        cls,
        sigmas: Sequence[float],
        solver: str = "euler",
        flow: bool = True,
        options: Mapping[str, float] | None = None,
    ) -> Trajectory:
        """One solver for every step."""
        return cls(sigmas, flow, (StepSolver(solver, options or {}),))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def is_uniform(self) -> bool:
        """Whether every step has the same solver, of which nothing was learned."""
        return len(set(self.solvers)) == 1 and not self.solvers[0].learned

    @property
    def solver(self) -> str:
        """The solver's name; of several their names in order, e.g. "euler+dpmpp_2m"."""
        return "+".join(dict.fromkeys(step.name for step in self.solvers))

    @property
    def options(self) -> dict[str, float]:
        """The options of the first step's solver that are known."""
        return dict(self.solvers[0].options)

    def differences(self, solver: str, options: Mapping[str, float] | None = None) -> str:
        """How a run with ``solver`` and ``options`` differs from this, in words; "" if it does not.

        ``options`` None: they are unknown, and not compared.
        """
        if solver != self.solver:
            return f"solver {self.solver!r}, not {solver!r}"
        parts = []
        for name, value in (
            () if options is None else get_solver(solver).check(dict(options)).items()
        ):
            before = self._values(name, value)
            if before != [value]:
                parts.append(f"{name} {' and '.join(map(str, before))}, not {value}")
        return "; ".join(parts)

    def _values(self, option: str, otherwise: float) -> list[float]:
        """The values that an option has in the steps; ``otherwise`` where it is not known.

        A schedule of one solver may be older than its options; of several each says what it is.
        """
        if self.is_uniform:
            return [self.options.get(option, otherwise)]
        each = (step.solver.check(dict(step.options))[option] for step in self.solvers)
        return list(dict.fromkeys(each))

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise after the first latent's."""
        return any(step.solver.stochastic for step in self.solvers)

    def bind(self, model: ModelInfo) -> list[BoundSolver]:
        """Each step's solver for a model."""
        bound = {step: step.bind(model) for step in dict.fromkeys(self.solvers)}
        return [bound[step] for step in self.solvers]

    def describe(self) -> dict[str, Any]:
        """Plain JSON for provenance and studies."""
        content: dict[str, Any] = {"sigmas": list(self.sigmas), "flow": self.flow}
        if self.is_uniform:
            return {**content, "solver": self.solver, "options": self.options}
        return {**content, "solvers": [step.to_json() for step in self.solvers]}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; :meth:`from_json` gives an equal trajectory back."""
        solvers = self.solvers[:1] if len(set(self.solvers)) == 1 else self.solvers
        return {
            "sigmas": list(self.sigmas),
            "flow": self.flow,
            "solvers": [step.to_json() for step in solvers],
        }

    @classmethod
    def from_json(cls, content: Any) -> Trajectory:
        """ScheduleError names what is wrong with ``content``."""
        if not isinstance(content, dict):
            raise ScheduleError(f"trajectory={shown(content)} must be an object")
        take(content, "the trajectory", {"sigmas", "flow", "solvers"}, set())
        solvers = content["solvers"]
        if not isinstance(solvers, list) or not solvers:
            raise ScheduleError(f"solvers={shown(solvers)} must be a list, one a step, or one")
        return cls(
            content["sigmas"],
            content["flow"],
            tuple(StepSolver.from_json(solver) for solver in solvers),
        )


@dataclass(frozen=True)
class Candidate:
    """One way to make pictures: a trajectory, and the correction on it.

    ScheduleError unless both have the same number of steps.
    """

    trajectory: Trajectory
    correction: Correction

    def __post_init__(self):
        if self.correction.steps != self.trajectory.steps:
            raise ScheduleError(
                f"the correction has {self.correction.steps} steps and the trajectory "
                f"{self.trajectory.steps}; give one a step"
            )

    @classmethod
    def identity(cls, trajectory: Trajectory) -> Candidate:
        """The base solvers, bit for bit."""
        return cls(trajectory, DEFAULT.identity(trajectory.steps))

    @property
    def is_identity(self) -> bool:
        return self.correction.is_identity
