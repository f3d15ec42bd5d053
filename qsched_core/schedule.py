"""QSchedule: the learned coefficients of one sampling trajectory, as a small versioned JSON.

Source of the method: Q-Sched (arXiv 2509.01624).  Coefficients belong to noise levels (sigma), not
to step numbers, so a schedule can serve a partial denoise or another step count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import schedule_json
from .files import write_atomic
from .precondition import ScalarCorrection
from .schedule_checks import (
    MAX_COEFFICIENT,
    MAX_STEPS,
    MIN_COEFFICIENT,
    ScheduleError,
    check_coefficient,
    check_falling,
    numbers,
    plain_json,
)
from .schedule_match import SIGMA_TOLERANCE, Place, places
from .solvers import get_solver
from .text import shown

FORMAT = "qsched"
VERSION = 1
MODES = ("interpolate", "strict")
EDITS = ("add", "multiply", "set")
# A correction in the file is {"kind": ..., fields of that kind}.
KINDS = {"scalar": {"c_x", "c_eps"}}


@dataclass(frozen=True)
class Match:
    """A schedule brought to the sigmas that are being sampled."""

    correction: ScalarCorrection
    note: str = ""  # empty where every sigma was learned; else what was done instead


@dataclass(frozen=True)
class QSchedule:
    """Two scalars a step for the trajectory ``sigmas`` [steps + 1] of ``solver``.

    ``flow`` says whether sigma is the flow's time in [0, 1] (velocity models) or the noise's
    standard deviation (epsilon and v models).  ``provenance`` is plain JSON: what the coefficients
    were learned for and the scores before and after.  Raises ScheduleError on any invalid field.
    """

    sigmas: tuple[float, ...]
    c_x: tuple[float, ...]
    c_eps: tuple[float, ...]
    solver: str = "euler"
    flow: bool = True
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("sigmas", "c_x", "c_eps"):
            object.__setattr__(self, name, numbers(name, getattr(self, name)))
        check_falling(self.sigmas)
        for name in ("c_x", "c_eps"):
            values = getattr(self, name)
            if len(values) != self.steps:
                raise ScheduleError(
                    f"{name} has {len(values)} values for {self.steps} steps; give one a step"
                )
            for position, value in enumerate(values):
                check_coefficient(f"{name}[{position}]", value)
        if not isinstance(self.flow, bool):
            raise ScheduleError(f"flow={shown(self.flow)} must be true or false")
        if self.flow and self.sigmas[0] > 1 + SIGMA_TOLERANCE:
            raise ScheduleError(
                f"sigmas starts at {self.sigmas[0]:.6g}; a flow model's sigma is at most 1"
            )
        if not isinstance(self.solver, str):
            raise ScheduleError(f"solver={shown(self.solver)} must be a solver's name")
        try:
            get_solver(self.solver)
        except ValueError as error:
            known = str(error).partition("; ")[2]
            raise ScheduleError(f"solver={shown(self.solver)} is unknown; {known}") from None
        if not isinstance(self.provenance, Mapping):
            raise ScheduleError(f"provenance={shown(self.provenance)} must be an object")
        object.__setattr__(self, "provenance", plain_json("provenance", self.provenance))

    def __hash__(self):
        return hash((self.sigmas, self.c_x, self.c_eps, self.solver, self.flow))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def is_identity(self) -> bool:
        """Whether this is the base solver, bit for bit."""
        return all(c == 1.0 for c in self.c_x + self.c_eps)

    @classmethod
    def identity(
        cls, sigmas: Sequence[float], solver: str = "euler", flow: bool = True, **provenance
    ):
        ones = (1.0,) * max(0, len(sigmas) - 1)
        return cls(tuple(sigmas), ones, ones, solver, flow, provenance)

    @classmethod
    def ramp(
        cls,
        sigmas: Sequence[float],
        c_x: tuple[float, float],
        c_eps: tuple[float, float],
        solver: str = "euler",
        flow: bool = True,
        **provenance,
    ) -> QSchedule:
        """The paper's parametrisation: each coefficient runs linearly from (start) to (end)."""
        steps = len(sigmas) - 1
        return cls(
            tuple(sigmas),
            linear_ramp(*c_x, steps),
            linear_ramp(*c_eps, steps),
            solver,
            flow,
            provenance,
        )

    def correction(self) -> ScalarCorrection:
        """The correction for exactly the learned sigmas."""
        return ScalarCorrection(self.c_x, self.c_eps)

    def at(self, sigmas: Sequence[float], mode: str = "interpolate") -> Match:
        """Coefficients for the trajectory ``sigmas`` [m + 1].

        A sigma that was learned (to a relative 1e-3) gets its own coefficients; any other is
        interpolated linearly in log-SNR (held constant beyond the ends) and the match's note says
        so.  The note also tells of steps that begin at a learned sigma and go to another one than
        they were learned for, as another step count makes them.  ScheduleError for either in mode
        "strict", and for sigmas that do not decrease.
        """
        if mode not in MODES:
            raise ScheduleError(f"mode={shown(mode)} is unknown; choose one of {', '.join(MODES)}")
        sigmas = numbers("sigmas", list(sigmas))
        check_falling(sigmas)
        found = places(sigmas[:-1], self.sigmas[:-1], self.flow)
        note = self._foreign(sigmas, found) or self._other_steps(sigmas, found)
        if note and mode == "strict":
            raise ScheduleError(f"{note}; calibrate for these sigmas, or set mode to 'interpolate'")
        correction = ScalarCorrection(
            tuple(place.pick(self.c_x) for place in found),
            tuple(place.pick(self.c_eps) for place in found),
        )
        return Match(correction, note)

    def _foreign(self, sigmas: Sequence[float], found: Sequence[Place]) -> str:
        """What is said of sigmas that were not learned; empty if all were."""
        foreign = [s for s, place in zip(sigmas, found, strict=False) if not place.learned]
        if not foreign:
            return ""
        known = f"the schedule has {_count(self.steps)} at sigma {_listed(self.sigmas[:-1])}"
        return (
            f"{len(foreign)} of {_count(len(found))} have a sigma that was not learned "
            f"(sigma={_listed(foreign)}; {known}); their coefficients are interpolated in log-SNR"
        )

    def _other_steps(self, sigmas: Sequence[float], found: Sequence[Place]) -> str:
        """What is said of learned sigmas from which another step is made; empty if none is."""
        for i, place in enumerate(found):
            end, learned = sigmas[i + 1], self.sigmas[place.index + 1]
            if abs(end - learned) > SIGMA_TOLERANCE * sigmas[i]:
                return (
                    f"step {i + 1} of {len(found)} goes from sigma {sigmas[i]:.4g} to {end:.4g}, "
                    f"and was learned to {learned:.4g} (the schedule has {_count(self.steps)})"
                )
        return ""

    def tail(self, denoise: float) -> tuple[float, ...]:
        """The sigmas of a partial denoise: those of the last ``denoise`` of the steps, rounded.

        ScheduleError unless ``denoise`` is above 0 and at most 1; at least one step is left.
        """
        if not 0 < denoise <= 1:
            raise ScheduleError(f"denoise={denoise:.6g} must be above 0 and at most 1")
        return self.sigmas[-(max(1, round(self.steps * denoise)) + 1) :]

    def edited(
        self,
        step: int = 0,
        c_x: float | None = None,
        c_eps: float | None = None,
        mode: str = EDITS[0],
    ) -> QSchedule:
        """A copy with the coefficients of one step changed; step 0 is all of them.

        ``step`` counts from 1.  ``mode`` "add" and "multiply" work on the coefficient that is
        there, "set" replaces it; None leaves it.  The provenance then says that it was edited, and
        keeps what was measured with the original apart, under "original".  An edit that changes
        nothing gives the schedule itself.  ScheduleError names a step that is not there, and a
        coefficient that would leave [0.25, 4].
        """
        if mode not in EDITS:
            raise ScheduleError(f"mode={shown(mode)} is unknown; choose one of {', '.join(EDITS)}")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ScheduleError(
                f"step={shown(step)} is not in the schedule; choose 1 to {self.steps}, or 0 for all"
            )
        changed = {}
        for name, value in (("c_x", c_x), ("c_eps", c_eps)):
            column = list(getattr(self, name))
            chosen = range(self.steps) if step == 0 else (step - 1,)
            for i in chosen if value is not None else ():
                column[i] = _edit(f"{name} of step {i + 1}", column[i], mode, value)
            changed[name] = tuple(column)
        if changed == {"c_x": self.c_x, "c_eps": self.c_eps}:
            return self
        edit = {"step": step, "mode": mode, "c_x": c_x, "c_eps": c_eps}
        return replace(self, **changed, provenance=self._edited_provenance(edit))

    def _edited_provenance(self, edit: dict[str, Any]) -> dict[str, Any]:
        """Still for the same model and sampling; scores and verdict are the original's."""
        facts = self.provenance
        kept = {key: facts[key] for key in ("model", "sampling") if key in facts}
        edits, original = facts.get("edits"), facts.get("original")
        if not isinstance(edits, list) or not isinstance(original, dict):  # the first edit
            edits = []
            original = {"c_x": self.c_x, "c_eps": self.c_eps, "provenance": facts}
        return {"source": "edit", **kept, "edits": [*edits, edit], "original": original}

    def to_json(self) -> str:
        """Versioned JSON text; :meth:`from_json` gives an equal schedule back."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "solver": self.solver,
            "flow": self.flow,
            "sigmas": list(self.sigmas),
            "correction": {"kind": "scalar", "c_x": list(self.c_x), "c_eps": list(self.c_eps)},
            "provenance": self.provenance,
        }
        return schedule_json.dump(content)

    @classmethod
    def from_json(cls, text: str) -> QSchedule:
        """Parse :meth:`to_json`'s text; ScheduleError names what is wrong with anything else."""
        content = schedule_json.parse(text)
        if content.get("format") != FORMAT:
            raise ScheduleError(f'not a schedule: an object with "format": "{FORMAT}" is needed')
        version = content.get("version")
        if type(version) is not int or version != VERSION:
            raise ScheduleError(
                f"version={shown(version)} is not known here (this reads version {VERSION}); "
                "update the nodes"
            )
        fields = {"format", "version", "solver", "flow", "sigmas", "correction"}
        schedule_json.take(content, "the schedule", fields, {"provenance"})
        correction = content["correction"]
        kind = correction.get("kind") if isinstance(correction, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ScheduleError(
                f"correction kind={shown(kind)} is not known here; choose one of "
                f"{', '.join(KINDS)}, or update the nodes"
            )
        schedule_json.take(correction, "the correction", {"kind", *KINDS[kind]}, set())
        return cls(
            content["sigmas"],
            correction["c_x"],
            correction["c_eps"],
            content["solver"],
            content["flow"],
            content.get("provenance", {}),
        )

    def save(self, path: str | Path, overwrite: bool = True) -> Path:
        """Write the JSON atomically; OSError leaves no partial file.

        FileExistsError if ``path`` is there and ``overwrite`` is False.
        """
        return write_atomic(path, self.to_json() + "\n", overwrite)

    @classmethod
    def load(cls, path: str | Path) -> QSchedule:
        """Read a schedule file; ScheduleError names the file and what is wrong with it."""
        limit = 4 * schedule_json.MAX_TEXT  # bytes of UTF-8
        try:
            with open(path, "rb") as file:
                return cls.from_json(file.read(limit + 1).decode())
        except (ScheduleError, UnicodeDecodeError) as error:
            raise ScheduleError(f"{path}: {error}") from None

    def describe(self) -> str:
        """A small text table, a row a step."""
        rows = [f"{self.solver}, {self.steps} steps, {'flow' if self.flow else 'epsilon'} sigmas"]
        rows += [
            f"  step {i + 1}: sigma {sigma:.4f}  c_x {c_x:.4f}  c_eps {c_eps:.4f}"
            for i, (sigma, c_x, c_eps) in enumerate(
                zip(self.sigmas, self.c_x, self.c_eps, strict=False)
            )
        ]
        return "\n".join(rows)


def linear_ramp(start: float, end: float, steps: int) -> tuple[float, ...]:
    """``steps`` values from ``start`` to ``end``; a single step takes ``start``."""
    if steps == 1:
        return (start,)
    return tuple(start + (end - start) * i / (steps - 1) for i in range(steps))


def _edit(name: str, value: float, mode: str, by: float) -> float:
    (by,) = numbers(f"the change of {name}", [by])
    after = {"multiply": value * by, "add": value + by, "set": by}[mode]
    check_coefficient(name, after)
    return after


def _count(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _listed(values: Sequence[float], most: int = 8) -> str:
    text = ", ".join(f"{value:.4g}" for value in values[:most])
    return text if len(values) <= most else f"{text}, ... {values[-1]:.4g}"


__all__ = [
    "MAX_COEFFICIENT",
    "MAX_STEPS",
    "MIN_COEFFICIENT",
    "Match",
    "QSchedule",
    "ScheduleError",
    "check_coefficient",
    "linear_ramp",
]
