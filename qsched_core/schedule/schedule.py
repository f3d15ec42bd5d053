"""QSchedule: a learned correction of one sampling trajectory, as a small versioned JSON.

Source of the method: Q-Sched (arXiv 2509.01624).  A correction belongs to noise levels (sigma), not
to step numbers, so a schedule can serve a partial denoise or another step count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import strict_json
from ..correction import DEFAULT, Correction, correction_from_json, correction_to_json
from ..files import write_atomic
from ..sigmas import SIGMA_TOLERANCE, SigmaMatch, check_falling, match_sigmas, same
from ..text import shown
from ..trajectory import Candidate, StepSolver, Trajectory
from ..validation import ScheduleError, numbers, plain_json

FORMAT = "qsched"
VERSION = 2
MODES = ("interpolate", "strict")
EDITS = ("add", "multiply", "set")


@dataclass(frozen=True)
class Match:
    """A schedule brought to the sigmas that are being sampled, one solver a step.

    ``note`` is empty where every sigma was learned, and else says what was done instead.
    """

    correction: Correction
    solvers: tuple[StepSolver, ...]
    note: str = ""


@dataclass(frozen=True)
class QSchedule:
    """A correction, and the trajectory that it belongs to.

    ``provenance`` is plain JSON: what the correction was learned for and the scores before and
    after.  Raises ScheduleError on any invalid field.
    """

    trajectory: Trajectory
    correction: Correction
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        Candidate(self.trajectory, self.correction)
        if not isinstance(self.provenance, Mapping):
            raise ScheduleError(f"provenance={shown(self.provenance)} must be an object")
        object.__setattr__(self, "provenance", plain_json("provenance", self.provenance))

    def __hash__(self):
        return hash((self.trajectory, self.correction))

    @classmethod
    def identity(cls, trajectory: Trajectory, **provenance) -> QSchedule:
        """The base solvers, bit for bit."""
        return cls(trajectory, DEFAULT.identity(trajectory.steps), provenance)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.trajectory.sigmas

    @property
    def steps(self) -> int:
        return self.trajectory.steps

    @property
    def flow(self) -> bool:
        return self.trajectory.flow

    @property
    def solver(self) -> str:
        return self.trajectory.solver

    @property
    def is_identity(self) -> bool:
        """Whether this is the base solver, bit for bit."""
        return self.correction.is_identity

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.trajectory, self.correction)

    @property
    def replaced_sigmas(self) -> tuple[float, ...] | None:
        """The scheduler's noise levels that learned ones took the place of; None where none did."""
        sampling = self.provenance.get("sampling")
        before = sampling.get("sigmas") if isinstance(sampling, Mapping) else None
        try:
            found = numbers("sigmas", before)
        except ScheduleError:  # not told, or something else
            return None
        pairs = zip(found, self.sigmas, strict=False)
        kept = len(found) == len(self.sigmas) and all(a == b or same(a, b) for a, b in pairs)
        return None if kept else found

    def over(self, trajectory: Trajectory) -> tuple[Candidate, str]:
        """What the schedule makes of ``trajectory`` (one solver), and a note on what was not learned.

        Learned noise levels take the place of the trajectory's, and so do several solvers; else the
        coefficients are matched to its own.  ScheduleError for a model of the other kind, unless this
        changes nothing.
        """
        uniform = self.trajectory.is_uniform
        if self.replaced_sigmas is not None or not uniform or not self.is_identity:
            self.check_flow(trajectory.flow)
        sigmas = trajectory.sigmas if self.replaced_sigmas is None else self.sigmas
        match = self.at(sigmas)
        solvers = trajectory.solvers[:1] if uniform else match.solvers
        return Candidate(Trajectory(sigmas, trajectory.flow, solvers), match.correction), match.note

    def check_flow(self, flow: bool) -> None:
        """ScheduleError unless a model's sigmas (``flow`` or not) are of the kind that was learned."""
        if flow != self.flow:
            learned, found = ("a flow", "an epsilon") if self.flow else ("an epsilon", "a flow")
            raise ScheduleError(
                f"the schedule was learned for {learned} model but this is {found} model; "
                "calibrate it for this model"
            )

    def at(self, sigmas: Sequence[float], mode: str = "interpolate") -> Match:
        """Coefficients for the trajectory ``sigmas`` [m + 1].

        A sigma that was learned (to a relative 1e-3) gets its own coefficients.  For any other they
        are interpolated linearly in log-SNR, and held constant beyond the ends; the match's note says
        so.  The note also tells of steps that start at a learned sigma but end at another one than in
        the learned trajectory: another step count makes such steps.  In mode "strict" both are a
        ScheduleError; so are sigmas that do not decrease.
        """
        if mode not in MODES:
            raise ScheduleError(f"mode={shown(mode)} is unknown; choose one of {', '.join(MODES)}")
        sigmas = numbers("sigmas", list(sigmas))
        check_falling(sigmas)
        found = match_sigmas(sigmas[:-1], self.sigmas[:-1], self.flow)
        note = self._foreign(sigmas, found) or self._other_steps(sigmas, found)
        if note and mode == "strict":
            raise ScheduleError(f"{note}; calibrate for these sigmas, or set mode to 'interpolate'")
        solvers = self.trajectory.solvers
        nearest = (solvers[match.index + (match.share > 0.5)] for match in found)
        return Match(self.correction.at(found), tuple(nearest), note)

    def _foreign(self, sigmas: Sequence[float], found: Sequence[SigmaMatch]) -> str:
        """The note on sigmas that were not learned; empty if all were."""
        foreign = [s for s, match in zip(sigmas, found, strict=False) if not match.learned]
        if not foreign:
            return ""
        known = f"the schedule has {_count(self.steps)} at sigma {_listed(self.sigmas[:-1])}"
        return (
            f"{len(foreign)} of {_count(len(found))} have a sigma that was not learned "
            f"(sigma={_listed(foreign)}; {known}); their coefficients are interpolated in log-SNR"
        )

    def _other_steps(self, sigmas: Sequence[float], found: Sequence[SigmaMatch]) -> str:
        """The note on steps that start at a learned sigma and end elsewhere; empty if there are none."""
        for i, match in enumerate(found):
            end, learned = sigmas[i + 1], self.sigmas[match.index + 1]
            if abs(end - learned) > SIGMA_TOLERANCE * sigmas[i]:
                return (
                    f"step {i + 1} of {len(found)} goes from sigma {sigmas[i]:.4g} to {end:.4g}, "
                    f"and was learned to {learned:.4g} (the schedule has {_count(self.steps)})"
                )
        return ""

    def tail(self, denoise: float) -> tuple[float, ...]:
        """The sigmas of a partial denoise: those of the last round(``denoise`` * steps) steps.

        ScheduleError unless ``denoise`` is above 0 and at most 1; at least one step is left.
        """
        if not 0 < denoise <= 1:
            raise ScheduleError(f"denoise={denoise:.6g} must be above 0 and at most 1")
        return self.sigmas[-(max(1, round(self.steps * denoise)) + 1) :]

    def edited(
        self, changes: Mapping[str, float | None], step: int = 0, mode: str = EDITS[0]
    ) -> QSchedule:
        """A copy with numbers of one step changed; step 0 is all of them.

        ``changes`` maps parameters of the correction to numbers; None changes nothing.  ``step``
        counts from 1.  ``mode`` "add" and "multiply" work on the old number, "set" replaces it.  The
        provenance of the copy tells of the edit; what was measured with the original is moved to
        "original" there.  An edit that changes nothing gives the schedule itself.  ScheduleError
        names a step or parameter that does not exist, and a number that would be out of range.
        """
        if mode not in EDITS:
            raise ScheduleError(f"mode={shown(mode)} is unknown; choose one of {', '.join(EDITS)}")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ScheduleError(
                f"step={shown(step)} is not in the schedule; choose 1 to {self.steps}, or 0 for all"
            )
        rows = self.correction.rows()
        parameters = {parameter.name: parameter for parameter in self.correction.parameters}
        edited = dict(rows)
        for name, by in changes.items():
            if name not in rows:
                raise ScheduleError(
                    f"{name}={shown(by)} is no coefficient; there are {', '.join(rows)}"
                )
            if by is None:
                continue
            (by,) = numbers(f"the change of {name}", [by])
            column = list(rows[name])
            for i in range(self.steps) if step == 0 else (step - 1,):
                column[i] = {"multiply": column[i] * by, "add": column[i] + by, "set": by}[mode]
                parameters[name].check(f"{name} of step {i + 1}", column[i])
            edited[name] = tuple(column)
        if edited == rows:
            return self
        edit = {"step": step, "mode": mode, **changes}
        return replace(
            self,
            correction=self.correction.with_rows(edited),
            provenance=self._edited_provenance(edit),
        )

    def _edited_provenance(self, edit: dict[str, Any]) -> dict[str, Any]:
        """Model and sampling are kept; scores and verdict go to "original"."""
        before = self.provenance
        kept = {key: before[key] for key in ("model", "sampling") if key in before}
        edits, original = before.get("edits"), before.get("original")
        if not isinstance(edits, list) or not isinstance(original, dict):  # the first edit
            edits = []
            original = {**self.correction.rows(), "provenance": before}
        return {"source": "edit", **kept, "edits": [*edits, edit], "original": original}

    @property
    def original(self) -> QSchedule | None:
        """What an edited schedule was before its edits; None for any other."""
        before = self.provenance.get("original")
        if not isinstance(before, dict):
            return None
        try:
            rows = {name: before[name] for name in self.correction.rows()}
            return QSchedule(self.trajectory, self.correction.with_rows(rows))
        except (KeyError, ScheduleError):
            return None

    def to_json(self) -> str:
        """Versioned JSON text; :meth:`from_json` gives an equal schedule back.

        It is version 1, which older nodes read, wherever that can express the schedule.
        """
        return strict_json.dump(self._version_1() or self._version_2())

    def _version_1(self) -> dict[str, Any] | None:
        trajectory = self.trajectory
        said = self.correction.kind == "scalar" and trajectory.is_uniform
        if not said or trajectory.options != _learned_options(trajectory.solver, self.provenance):
            return None
        return {
            "format": FORMAT,
            "version": 1,
            "solver": trajectory.solver,
            "flow": trajectory.flow,
            "sigmas": list(trajectory.sigmas),
            "correction": correction_to_json(self.correction),
            "provenance": self.provenance,
        }

    def _version_2(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "trajectory": self.trajectory.to_json(),
            "correction": correction_to_json(self.correction),
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, text: str) -> QSchedule:
        """Parse :meth:`to_json`'s text; ScheduleError names what is wrong with anything else."""
        content = strict_json.parse(text)
        if content.get("format") != FORMAT:
            raise ScheduleError(f'not a schedule: an object with "format": "{FORMAT}" is needed')
        version = content.get("version")
        if type(version) is not int or version not in _TRAJECTORIES:
            known = " and ".join(map(str, _TRAJECTORIES))
            raise ScheduleError(
                f"version={shown(version)} is not known here (this reads versions {known}); "
                "update the nodes"
            )
        fields, trajectory_of = _TRAJECTORIES[version]
        required = {"format", "version", "correction", *fields}
        strict_json.take(content, "the schedule", required, {"provenance"})
        correction = correction_from_json(content["correction"])
        return cls(trajectory_of(content), correction, content.get("provenance", {}))

    def save(self, path: str | Path, overwrite: bool = True) -> Path:
        """Write the JSON atomically; OSError leaves no partial file.

        FileExistsError if ``path`` is there and ``overwrite`` is False.
        """
        return write_atomic(path, self.to_json() + "\n", overwrite)

    @classmethod
    def load(cls, path: str | Path) -> QSchedule:
        """Read a schedule file; ScheduleError names the file and what is wrong with it."""
        limit = 4 * strict_json.MAX_TEXT  # bytes of UTF-8
        try:
            with open(path, "rb") as file:
                return cls.from_json(file.read(limit + 1).decode())
        except (ScheduleError, UnicodeDecodeError) as error:
            raise ScheduleError(f"{path}: {error}") from None

    def describe(self) -> str:
        """A small text table, a row a step; with the solver of each where there are several."""
        columns, uniform = self.correction.rows(), self.trajectory.is_uniform
        lines = [f"{self.solver}, {self.steps} steps, {'flow' if self.flow else 'epsilon'} sigmas"]
        for i, sigma in enumerate(self.sigmas[:-1]):
            cells = "".join(f"  {name} {values[i]:.4f}" for name, values in columns.items())
            name = "" if uniform else f"  {self.trajectory.solvers[i].label}"
            lines.append(f"  step {i + 1}: sigma {sigma:.4f}{cells}{name}")
        return "\n".join(lines)


def _learned_options(solver: str, provenance: Any) -> dict[str, float]:
    """The solver options of a version 1 schedule, which are in its provenance only."""
    sampling = provenance.get("sampling") if isinstance(provenance, Mapping) else None
    options = sampling.get("options") if isinstance(sampling, Mapping) else None
    try:
        return dict(StepSolver(solver, options).options)
    except ScheduleError:  # "options" holds something else
        return {}


def _trajectory_1(content: dict[str, Any]) -> Trajectory:
    name = StepSolver(content["solver"]).name
    options = _learned_options(name, content.get("provenance", {}))
    return Trajectory(content["sigmas"], content["flow"], (StepSolver(name, options),))


def _trajectory_2(content: dict[str, Any]) -> Trajectory:
    return Trajectory.from_json(content["trajectory"])


# by version: the fields that describe the trajectory, and their reader
_TRAJECTORIES = {
    1: (("solver", "flow", "sigmas"), _trajectory_1),
    2: (("trajectory",), _trajectory_2),
}


def _count(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _listed(values: Sequence[float], most: int = 8) -> str:
    text = ", ".join(f"{value:.4g}" for value in values[:most])
    return text if len(values) <= most else f"{text}, ... {values[-1]:.4g}"
