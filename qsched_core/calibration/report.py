"""What a calibration found, as text and as one picture (PIL alone)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, Canvas
from ..prompts import PromptSet
from ..study import fingerprint
from ..text import markdown, plain

if TYPE_CHECKING:
    from .calibrate import CalibrationResult

WIDTH, MARGIN, GAP = 1024, 32, 20
PLOT_HEIGHT = 260
SAMPLE_SIZE = 150


@dataclass(frozen=True)
class Sample:
    """A prompt's picture before and after, and its gain in JAQ."""

    prompt: str
    gain: float
    before: Image.Image
    after: Image.Image


def typical(gains: Sequence[float]) -> list[int]:
    """Positions of the worst, the median and the best gain (fewer when there are fewer)."""
    order = sorted(range(len(gains)), key=gains.__getitem__)
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))


def verdict_text(result: CalibrationResult) -> str:
    """What a user must know, in a few lines: the verdict, what the control says, every warning.

    Each line is a sentence: one of ComfyUI's two canvases runs lines together.
    """
    verdict, count = result.verdict, len(result.warnings)
    lines = [verdict.text]
    if count:
        lines.insert(0, f"{verdict.kind}, with {count} warning{'s' * (count > 1)} (below)")
    if result.control is not None:
        lines.append(result.control.text)
    lines += [f"Warning: {plain(warning)}" for warning in result.warnings]
    return "\n".join(f"{line}." for line in lines)


def report_text(result: CalibrationResult) -> str:
    """The verdict, the scores before and after term by term, the coefficients, and the cost."""
    found = (result.control, result.precheck)
    lines = [result.verdict.text, *(part.text for part in found if part is not None), ""]
    rows = [("", "before", "after", "difference")]
    for part, before, after in (
        ("calibration", result.baseline.scores, result.winner.scores),
        ("held-out", result.heldout_before, result.heldout_after),
    ):
        old, new = before.means(), after.means()
        rows += [
            (
                f"{part} {name}",
                f"{old[name]:.4f}",
                f"{new[name]:.4f}",
                f"{new[name] - old[name]:+.4f}",
            )
            for name in ("jaq", "alignment", "quality")
        ]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines += [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[k]:>{widths[k]}}" for k in (1, 2, 3))
        for row in rows
    ]
    if result.winner.candidate != result.baseline.candidate:
        kept = " (not used: the guard keeps c = 1)" if result.verdict.keep_identity else ""
        rows, best = result.best.correction.rows(), result.best.trajectory
        what, names = "best coefficients found", [""] * best.steps
        if result.learned_trajectory:
            rows, what = {"sigma": best.sigmas, **rows}, "best trajectory found"
        if not best.is_uniform:
            names = [f"  {step.label}" for step in best.solvers]
        lines += ["", f"{what}{kept}:"]
        lines += [
            f"  step {i + 1}: "
            + "  ".join(f"{name} {row[i]:.4f}" for name, row in rows.items())
            + names[i]
            for i in range(best.steps)
        ]
    lines += ["", *(f"warning: {plain(warning)}" for warning in result.warnings)]
    resumed = len(result.trials) - result.new_trials
    lines += [
        f"{len(result.trials)} trials ({resumed} not made in this run), "
        f"{result.nfe} model evaluations (NFE), {result.seconds:.0f} s",
        f"study: {markdown(result.where)}",
    ]
    return "\n".join(lines)


def report_path(result: CalibrationResult, heldout: PromptSet) -> Path:
    """Where the report's picture is kept: beside the journal, under a name that depends on what it shows.

    The journal's own name covers model, objective, search and calibration prompts.
    """
    shown = {
        "verdict": [result.verdict.text, result.verdict.keep_identity],
        "notes": [part and part.text for part in (result.control, result.precheck)],
        "warnings": list(result.warnings),
        "trials": [[trial.value, trial.pruned] for trial in result.trials],
        "best": result.best.correction.to_json(),
        **({"trajectory": result.best.trajectory.to_json()} if result.learned_trajectory else {}),
        "heldout": heldout.hash,
        "scores": [list(s.jaq) for s in (result.heldout_before, result.heldout_after)],
    }
    return result.journal.with_suffix(f".{fingerprint(shown)[:16]}.png")


def report_picture(result: CalibrationResult, samples: Sequence[Sample] = ()) -> Image.Image:
    """Objective by trial, coefficients by step, and the samples' images; RGB, 1024 wide."""
    pen = Canvas(WIDTH)
    y = _title(pen, result)
    half = (WIDTH - 2 * MARGIN - 2 * GAP) // 2
    _objective_plot(pen, (MARGIN, y, MARGIN + half, y + PLOT_HEIGHT), result)
    _coefficient_plot(pen, (WIDTH - MARGIN - half, y, WIDTH - MARGIN, y + PLOT_HEIGHT), result)
    y += PLOT_HEIGHT + 2 * GAP
    if samples:
        y = _samples(pen, y + 20, samples)
    return pen.finish(y + MARGIN)


def _title(pen: Canvas, result: CalibrationResult) -> float:
    """The verdict, and what control and pre-check say; the y below."""
    kind, width = result.verdict.kind, WIDTH - 2 * MARGIN
    colour = {"helps": GREEN, "overfitted": ORANGE}.get(kind, GREY)
    pen.text(MARGIN, MARGIN - 8, f"Q-Sched calibration: {kind}", colour, 26)
    body = result.verdict.text.removeprefix(f"{kind}: ")
    y = pen.paragraph(MARGIN, MARGIN + 28, body, width, INK, 15, 19, most=4) + 6
    for part in (result.control, result.precheck):
        if part is not None:
            y = pen.paragraph(MARGIN, y, part.text, width, GREY, 13, 17)
    for warning in result.warnings:
        y = pen.paragraph(MARGIN, y, f"warning: {plain(warning)}", width, ORANGE, 13, 17)
    return y + 14


class _Axes:
    """A plot's frame: data to pixels, with grid lines and numbers."""

    def __init__(
        self, pen: Canvas, box, title: str, legend: Sequence[tuple[str, str]],
        xs: tuple[float, float], ys: tuple[float, float],
    ):  # fmt: skip
        self.pen, self.xs = pen, xs
        left, top, right, bottom = box
        free = right
        for text, colour in reversed(legend):
            pen.text(free, top - 2, text, colour, 13, "ra")
            free -= pen.length(text, 13) + 14
        pen.text(left, top - 4, title, INK, 16, width=free - left)
        self.left, self.top, self.right, self.bottom = left + 52, top + 28, right, bottom - 22
        pad = (ys[1] - ys[0]) * 0.08 or 0.01
        self.low, self.high = ys[0] - pad, ys[1] + pad
        for k in range(5):
            value = self.low + (self.high - self.low) * k / 4
            y = self.y(value)
            pen.line([(self.left, y), (self.right, y)], FAINT)
            pen.text(self.left - 6, y, f"{value:.3f}", GREY, 12, "rm")

    def x(self, value: float) -> float:
        low, high = self.xs
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + 8 + share * (self.right - self.left - 16)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        self.pen.dot(self.x(x), self.y(y), colour, radius)

    def label(self, value: float, text: str) -> None:
        self.pen.text(self.x(value), self.bottom + 5, text, GREY, 12, "mt")


def _objective_plot(pen: Canvas, box, result: CalibrationResult) -> None:
    values = [trial.value for trial in result.trials]
    base = values[0]
    spread = sorted(values)
    low = max(spread[0], min(base, spread[len(spread) // 4]) - (spread[-1] - base or 0.01))
    best, bests = base, []
    for value, trial in zip(values, result.trials, strict=True):
        best = best if trial.pruned else max(best, value)
        bests.append(best)
    axes = _Axes(
        pen, box, "calibration JAQ by trial",
        ((f"best: {best:.4f}", ORANGE), (f"c = 1: {base:.4f}", GREY)),
        (0, max(1, len(values) - 1)), (low, spread[-1]),
    )  # fmt: skip
    pen.dashes(axes.left, axes.right, axes.y(base))
    for index, (value, trial) in enumerate(zip(values, result.trials, strict=True)):
        pale = trial.pruned or value < low  # pruned, or below the axis
        axes.dot(index, max(value, low), FAINT if pale else BLUE)
    if len(bests) > 1:
        pen.line([(axes.x(i), axes.y(value)) for i, value in enumerate(bests)], ORANGE, 2)
    for index in sorted({0, (len(values) - 1) // 2, len(values) - 1}):
        axes.label(index, str(index + 1))


def _coefficient_plot(pen: Canvas, box, result: CalibrationResult) -> None:
    rows = result.best.correction.rows()
    curves = [
        (name, values, colour)
        for (name, values), colour in zip(rows.items(), (BLUE, ORANGE, PURPLE, GREEN), strict=False)
    ]
    every = [1.0, *(value for values in rows.values() for value in values)]
    steps = result.best.correction.steps
    title = "best coefficients by step" + (
        " (guarded: 1 is used)" if result.verdict.keep_identity else ""
    )
    axes = _Axes(
        pen, box, title, [(name, colour) for name, _, colour in curves],
        (0, max(1, steps - 1)), (min(*every, 0.99) - 0.01, max(*every, 1.01) + 0.01),
    )  # fmt: skip
    pen.line([(axes.left, axes.y(1)), (axes.right, axes.y(1))], GREY)
    for k, (_, values, colour) in enumerate(curves):
        if steps > 1:
            pen.line([(axes.x(i), axes.y(v)) for i, v in enumerate(values)], colour, 2)
        for i, value in enumerate(values):
            axes.dot(i, value, colour, 4)
            if steps <= 8:
                above = all(value >= row[i] for _, row, _ in curves[k + 1 :])
                side = -13 if above and all(value > row[i] for _, row, _ in curves[:k]) else 13
                anchor = "mm" if 0 < i < steps - 1 else ("lm" if i == 0 else "rm")
                pen.text(axes.x(i), axes.y(value) + side, f"{value:.3f}", colour, 12, anchor)
    for i in range(steps):
        if steps <= 16 or i in (0, steps - 1):
            axes.label(i, str(i + 1))


def _samples(pen: Canvas, y: float, samples: Sequence[Sample]) -> float:
    """Pictures before and after; the y below them."""
    count = len(samples)
    column = (WIDTH - 2 * MARGIN - GAP * (count - 1)) // count
    pen.text(MARGIN, y, "held-out images, c = 1 and best: worst, median and best gain")
    ends = []
    for index, sample in enumerate(samples):
        x = MARGIN + index * (column + GAP)
        size = min(SAMPLE_SIZE, (column - 6) // 2)
        for k, picture in enumerate((sample.before, sample.after)):
            height = max(1, picture.height * size // picture.width)
            pen.picture(x + k * (size + 6), y + 28, picture, size, height)
        below = y + 28 + height + 4
        colour = GREEN if sample.gain > 0 else ORANGE
        pen.text(x, below, f"JAQ {sample.gain:+.3f}", colour, 13)
        ends.append(pen.paragraph(x, below + 18, sample.prompt, column, GREY, 12, 15, most=2))
    return max(ends)
