"""What a schedule's provenance says, in words.

A schedule comes from anyone's file or workflow: anything may be missing or of another type, and is
then left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..text import markdown, plain
from .schedule import QSchedule

_SIGNS = {"multiply": "x {:.4g}", "add": "{:+.4g}", "set": "= {:.4g}"}


@dataclass(frozen=True)
class Score:
    """Mean JAQ of one set of prompts, and the 95 % interval of the paired gain if it is known."""

    part: str
    before: float
    after: float
    interval: tuple[float, float] | None = None
    count: int | None = None

    @property
    def gain(self) -> float:
        return self.after - self.before

    def __str__(self) -> str:
        where = self.part if self.count is None else f"{self.part}, {self.count} prompts"
        text = f"{where}: JAQ {self.before:.4f} -> {self.after:.4f} ({self.gain:+.4f}"
        if self.interval is not None:
            text += f", 95 % of it in {self.interval[0]:+.4f} to {self.interval[1]:+.4f}"
        return f"{text})"


def title(schedule: QSchedule) -> str:
    """Solver, step count and family of sigmas."""
    steps = f"{schedule.steps} step{'s' if schedule.steps > 1 else ''}"
    return f"{schedule.solver}, {steps}, {'flow' if schedule.flow else 'epsilon'} sigmas"


def provenance_rows(schedule: QSchedule) -> list[tuple[str, str]]:
    """(label, value) of what the provenance tells, in the order of interest."""
    found = schedule.provenance
    rows = [
        ("origin", _origin(found)),
        ("model", _text(found, "model", "source")),
        ("weights", _text(found, "model", "format")),
        ("runs on", _text(found, "model", "backend")),
        ("sampled at", _sampling(found)),
        ("levels", _levels(schedule)),
        ("objective", _text(found, "objective", "preset")),
        ("verdict", _verdict(found)),
        ("cost", _cost(found)),
    ]
    return [(label, value) for label, value in rows if value]


def scores(schedule: QSchedule) -> list[Score]:
    """What the search measured, without and with the best coefficients it found."""
    found = schedule.provenance
    rows = [
        _score(found, "calibration", "calibration"),
        _score(found, "heldout", "held-out"),
    ]
    return [row for row in rows if row is not None]


def summary(schedule: QSchedule) -> str:
    """The coefficients as a table, then everything the provenance tells, safe to be rendered."""
    lines = [schedule.describe()]
    lines += [f"{label}: {markdown(value)}" for label, value in provenance_rows(schedule)]
    lines += [str(score) for score in scores(schedule)]
    return "\n".join(lines)


def _origin(found: Any) -> str:
    source = _text(found, "source")
    if source == "calibration":
        search, trials = _text(found, "search", "strategy"), _number(found, "search", "trials")
        text = f"learned, search {search}" if search else "learned"
        return text if trials is None else f"{text}, {trials:.0f} trials"
    if source == "edit":
        edits = found.get("edits")
        shown = [_edit(edit) for edit in edits[-4:]] if isinstance(edits, list) else []
        more = len(edits) - len(shown) if isinstance(edits, list) else 0
        text = "; ".join([f"{more} more"] * (more > 0) + [edit for edit in shown if edit])
        return f"edited by hand ({text})" if text else "edited by hand"
    if source == "ranking":
        count, by = _number(found, "rankings", "count"), _text(found, "rankings", "by")
        told = "rankings" if count is None else f"{count:.0f} rankings"
        return f"learned by {told} of {by or 'somebody'}"
    if source == "ramp":
        return "a ramp, set by hand"
    return source or "not recorded"


def _edit(edit: Any) -> str:
    step, sign = _number(edit, "step"), _SIGNS.get(_text(edit, "mode"))
    if step is None or not sign:
        return ""
    changes = [
        f"{name} {sign.format(value)}"
        for name in edit
        if name not in ("step", "mode") and (value := _number(edit, name)) is not None
    ]
    if not changes:
        return ""
    return f"{'all steps' if step == 0 else f'step {step:.0f}'} {', '.join(changes)}"


def _levels(schedule: QSchedule) -> str:
    before = schedule.replaced_sigmas
    if before is None:
        return ""
    return f"noise levels learned, in place of {', '.join(f'{sigma:.4g}' for sigma in before[:17])}"


def _sampling(found: Any) -> str:
    width, height = _number(found, "sampling", "width"), _number(found, "sampling", "height")
    cfg = _number(found, "sampling", "cfg")
    parts = [] if None in (width, height) else [f"{width:.0f} x {height:.0f}"]
    return ", ".join([*parts, *([] if cfg is None else [f"cfg {cfg:.4g}"])])


def _verdict(found: Any) -> str:
    if _text(found, "source") == "edit":
        before = _text(found, "original", "provenance", "verdict")
        told = f" (the original: {before})" if before else ""
        return f"not measured since it was edited{told}"
    verdict = _text(found, "verdict")
    if verdict and _get(found, "guarded") is True:
        return f"{verdict}; the guard kept c = 1, the scores are those of the best candidate"
    return verdict


def _cost(found: Any) -> str:
    nfe, seconds = _number(found, "nfe"), _number(found, "seconds")
    if nfe is None:
        nfe = _number(found, "model_evaluations")  # schedules of older nodes
    if nfe is None:
        return ""
    text = f"{nfe:.0f} model evaluations (NFE)"
    return text if seconds is None else f"{text}, {seconds:.0f} s"


def _score(found: Any, key: str, part: str) -> Score | None:
    pair = _get(found, "scores", key)
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    before, after = (_number(means, "jaq") for means in pair)
    if before is None or after is None:
        return None
    gain = _get(found, "scores", f"{key}_gain")
    low, high = _number(gain, "low"), _number(gain, "high")
    count = _number(found, "prompts", key, "count")
    return Score(
        part,
        before,
        after,
        None if low is None or high is None else (low, high),
        None if count is None else int(count),
    )


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: Any, *keys: str) -> str:
    found = _get(value, *keys)
    return plain(" ".join(found[:4000].split()), 200) if isinstance(found, str) else ""


def _number(value: Any, *keys: str) -> float | None:
    found = _get(value, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return float(found)
