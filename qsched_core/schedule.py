"""QSchedule: the learned coefficients of one sampling trajectory, as a small versioned JSON.

Source of the method: Q-Sched (arXiv 2509.01624).  Coefficients belong to noise levels (sigma), not
to step numbers, so a schedule can serve a partial denoise or another step count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_atomic
from .precondition import ScalarCorrection
from .solvers import get_solver, log_snr

FORMAT = "qsched"
VERSION = 1
MIN_COEFFICIENT, MAX_COEFFICIENT = 0.25, 4.0
MAX_STEPS = 1000
SIGMA_TOLERANCE = 1e-3  # relative: schedulers differ in the last digits between devices
# log-SNR is infinite at the ends of a flow; coefficients are interpolated inside this range
_SNR_RANGE = (-12.0, 12.0)
MODES = ("interpolate", "strict")


class ScheduleError(ValueError):
    """A schedule, or a request to it, that can not be used; the message says how to mend it."""


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise ScheduleError(f"{name}={values!r} must be a list of numbers")
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ScheduleError(f"{name}[{position}]={value!r} must be a number")
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise ScheduleError(f"{name}[{position}]={value!r} must be finite")
    return tuple(float(value) for value in values)


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
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        steps = len(self.sigmas) - 1
        if not 1 <= steps <= MAX_STEPS:
            raise ScheduleError(
                f"sigmas has {len(self.sigmas)} values; give 2 to {MAX_STEPS + 1}, one more than steps"
            )
        for name in ("c_x", "c_eps"):
            values = getattr(self, name)
            if len(values) != steps:
                raise ScheduleError(
                    f"{name} has {len(values)} values for {steps} steps; give one a step"
                )
            for position, value in enumerate(values):
                if not MIN_COEFFICIENT <= value <= MAX_COEFFICIENT:
                    raise ScheduleError(
                        f"{name}[{position}]={value} is outside [{MIN_COEFFICIENT}, {MAX_COEFFICIENT}]; "
                        "useful coefficients are near 1"
                    )
        if any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ScheduleError(f"sigmas={list(self.sigmas)} must decrease at every step")
        if self.sigmas[-1] < 0:
            raise ScheduleError(f"sigmas ends at {self.sigmas[-1]}; it may not fall below 0")
        if not isinstance(self.flow, bool):
            raise ScheduleError(f"flow={self.flow!r} must be true or false")
        if self.flow and self.sigmas[0] > 1 + SIGMA_TOLERANCE:
            raise ScheduleError(
                f"sigmas starts at {self.sigmas[0]}; a flow model's sigma is at most 1"
            )
        try:
            get_solver(self.solver)
        except (ValueError, TypeError) as error:
            raise ScheduleError(str(error)) from None
        if not isinstance(self.provenance, Mapping):
            raise ScheduleError(f"provenance={self.provenance!r} must be an object")
        try:
            plain = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ScheduleError(f"provenance must be plain JSON: {error}") from None
        object.__setattr__(self, "provenance", plain)

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
        interpolated linearly in log-SNR (held constant beyond the ends), or refused with
        ScheduleError in mode "strict".
        """
        if mode not in MODES:
            raise ScheduleError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        positions = [self._position(float(sigma)) for sigma in sigmas[:-1]]
        foreign = [i for i, position in enumerate(positions) if position != int(position)]
        if foreign and mode == "strict":
            raise ScheduleError(
                f"sigma={float(sigmas[foreign[0]]):.4g} (step {foreign[0] + 1} of {len(positions)}) was "
                f"not learned; this schedule has {self.steps} steps at sigma "
                f"{', '.join(f'{s:.4g}' for s in self.sigmas[:-1])}; retune, or set mode to 'interpolate'"
            )
        note = ""
        if foreign:
            note = (
                f"{len(foreign)} of {len(positions)} steps have a sigma that was not learned "
                f"(the schedule has {self.steps} steps); their coefficients are interpolated in log-SNR"
            )

        def pick(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(_interpolate(values, position) for position in positions)

        return Match(ScalarCorrection(pick(self.c_x), pick(self.c_eps)), note)

    def _position(self, sigma: float) -> float:
        """Where ``sigma`` lies among the learned ones: a whole number at one of them."""
        known = self.sigmas[:-1]
        for index, value in enumerate(known):
            if math.isclose(sigma, value, rel_tol=SIGMA_TOLERANCE):
                return float(index)
        target = self._log_snr(sigma)
        if target < self._log_snr(known[0]):
            return 1e-9  # held at the first value, yet told apart from a match
        for index in range(len(known) - 1):
            low, high = self._log_snr(known[index]), self._log_snr(known[index + 1])
            if target < high:
                return index + min(max((target - low) / (high - low), 1e-9), 1 - 1e-9)
        return len(known) - 1 + 1e-9

    def _log_snr(self, sigma: float) -> float:
        return min(max(log_snr(sigma, self.flow), _SNR_RANGE[0]), _SNR_RANGE[1])

    def to_json(self) -> str:
        """Versioned JSON text; :meth:`from_json` gives an equal schedule back."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "solver": self.solver,
            "flow": self.flow,
            "sigmas": list(self.sigmas),
            "correction": {"kind": "scalar", "c_x": list(self.c_x), "c_eps": list(self.c_eps)},
            "provenance": dict(self.provenance),
        }
        return json.dumps(content, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> QSchedule:
        """Parse :meth:`to_json`'s text; ScheduleError names what is wrong with anything else."""
        try:
            content = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ScheduleError(f"not a schedule: the text is not valid JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ScheduleError(f'not a schedule: an object with "format": "{FORMAT}" is needed')
        version = content.get("version")
        if isinstance(version, bool) or version != VERSION:
            raise ScheduleError(
                f"version={version!r} is not known here (this reads version {VERSION}); update the nodes"
            )
        correction = content.get("correction")
        kind = correction.get("kind") if isinstance(correction, dict) else None
        if kind != "scalar":
            raise ScheduleError(
                f"correction kind={kind!r} is not known here; 'scalar' is; update the nodes"
            )
        for name, holder in (("sigmas", content), ("c_x", correction), ("c_eps", correction)):
            if name not in holder:
                raise ScheduleError(f"{name} is missing from the schedule")
        return cls(
            content["sigmas"],
            correction["c_x"],
            correction["c_eps"],
            content.get("solver"),
            content.get("flow"),
            content.get("provenance", {}),
        )

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically; OSError leaves no partial file."""
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> QSchedule:
        """Read a schedule file; ScheduleError names the file and what is wrong with it."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
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


def _interpolate(values: tuple[float, ...], position: float) -> float:
    index = int(position)
    share = position - index
    if share == 0 or index + 1 >= len(values):
        return values[index]
    return values[index] + (values[index + 1] - values[index]) * share


__all__ = ["Match", "QSchedule", "ScheduleError", "linear_ramp"]
