"""What a calibration found, as text and as one picture (PIL alone)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..prompts import PromptSet
from ..text import drawable, markdown, plain
from .journal import fingerprint

if TYPE_CHECKING:
    from .calibrate import CalibrationResult

WIDTH, MARGIN, GAP = 1024, 32, 20
INK, GREY, LIGHT, PAPER = (30, 32, 36), (120, 124, 132), (225, 228, 232), (255, 255, 255)
BLUE, ORANGE, GREEN = (37, 99, 200), (214, 106, 18), (22, 130, 80)
PLOT_HEIGHT = 260
SAMPLE_SIZE, NOTE_HEIGHT = 150, 17


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
    if result.winner.correction != result.baseline.correction:
        kept = " (not used: the guard keeps c = 1)" if result.verdict.keep_identity else ""
        lines += ["", f"best coefficients found{kept}:"]
        lines += [
            f"  step {i + 1}: c_x {x:.4f}  c_eps {eps:.4f}"
            for i, (x, eps) in enumerate(zip(result.best.c_x, result.best.c_eps, strict=True))
        ]
    lines += ["", *(f"warning: {plain(warning)}" for warning in result.warnings)]
    resumed = len(result.trials) - result.new_trials
    lines += [
        f"{len(result.trials)} trials ({resumed} not made in this run), "
        f"{result.model_evaluations} model evaluations, {result.seconds:.0f} s",
        f"study: {markdown(result.where)}",
    ]
    return "\n".join(lines)


def report_path(result: CalibrationResult, heldout: PromptSet) -> Path:
    """Where the report's picture is kept: beside the journal, named by everything it shows.

    The journal's name stands for model, objective, search and the searched prompts.
    """
    shown = {
        "verdict": [result.verdict.text, result.verdict.keep_identity],
        "notes": [part and part.text for part in (result.control, result.precheck)],
        "trials": [[trial.value, trial.pruned] for trial in result.trials],
        "best": [result.best.c_x, result.best.c_eps],
        "heldout": heldout.hash,
        "scores": [list(s.jaq) for s in (result.heldout_before, result.heldout_after)],
    }
    return result.journal.with_suffix(f".{fingerprint(shown)[:16]}.png")


def report_picture(result: CalibrationResult, samples: Sequence[Sample] = ()) -> Image.Image:
    """Objective by trial, coefficients by step, and the samples' images; RGB, 1024 wide."""
    notes = _notes(result)
    height = MARGIN + 84 + NOTE_HEIGHT * len(notes) + PLOT_HEIGHT + 2 * GAP + 30
    rows = [sample.after.height * SAMPLE_SIZE // sample.after.width for sample in samples]
    if samples:
        height += 30 + max(rows) + 58
    image = Image.new("RGB", (WIDTH, height + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    y = _title(draw, result, notes)
    half = (WIDTH - 2 * MARGIN - 2 * GAP) // 2
    _objective_plot(draw, (MARGIN, y, MARGIN + half, y + PLOT_HEIGHT), result)
    _coefficient_plot(draw, (WIDTH - MARGIN - half, y, WIDTH - MARGIN, y + PLOT_HEIGHT), result)
    if samples:
        _samples(image, draw, y + PLOT_HEIGHT + 2 * GAP + 20, samples)
    return image


def _font(size: int):
    return ImageFont.load_default(size=size)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> list[str]:
    lines, font = [""], _font(size)
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _notes(result: CalibrationResult) -> list[str]:
    """What control and pre-check say, in lines that fit."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    found = (part.text for part in (result.control, result.precheck) if part is not None)
    return [line for text in found for line in _wrap(measure, text, WIDTH - 2 * MARGIN, 13)]


def _title(draw: ImageDraw.ImageDraw, result: CalibrationResult, notes: Sequence[str]) -> int:
    kind = result.verdict.kind
    colour = {"helps": GREEN, "overfitted": ORANGE}.get(kind, GREY)
    draw.text((MARGIN, MARGIN - 8), f"Q-Sched calibration: {kind}", colour, _font(26))
    body = result.verdict.text.removeprefix(f"{kind}: ")
    lines = _wrap(draw, body, WIDTH - 2 * MARGIN, 15)[:3]
    for index, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 28 + 19 * index), line, INK, _font(15))
    below = MARGIN + 28 + 19 * 3
    for index, line in enumerate(notes):
        draw.text((MARGIN, below + NOTE_HEIGHT * index), line, GREY, _font(13))
    return below + NOTE_HEIGHT * len(notes) + 12


class _Axes:
    """A plot's frame: data to pixels, with grid lines and numbers."""

    def __init__(self, draw, box, title: str, xs: tuple[float, float], ys: tuple[float, float]):
        self.draw, self.xs = draw, xs
        left, top, right, bottom = box
        draw.text((left, top - 4), title, INK, _font(16))
        self.left, self.top, self.right, self.bottom = left + 52, top + 28, right, bottom - 22
        pad = (ys[1] - ys[0]) * 0.08 or 0.01
        self.low, self.high = ys[0] - pad, ys[1] + pad
        for k in range(5):
            value = self.low + (self.high - self.low) * k / 4
            y = self.y(value)
            draw.line((self.left, y, self.right, y), LIGHT, 1)
            draw.text((self.left - 6, y), f"{value:.3f}", GREY, _font(12), anchor="rm")

    def x(self, value: float) -> float:
        low, high = self.xs
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + 8 + share * (self.right - self.left - 16)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def dot(self, x: float, y: float, colour, radius: float = 3):
        px, py = self.x(x), self.y(y)
        self.draw.ellipse((px - radius, py - radius, px + radius, py + radius), fill=colour)

    def label(self, value: float, text: str):
        self.draw.text((self.x(value), self.bottom + 5), text, GREY, _font(12), anchor="mt")


def _objective_plot(draw, box, result: CalibrationResult) -> None:
    values = [trial.value for trial in result.trials]
    base = values[0]
    spread = sorted(values)
    low = max(spread[0], min(base, spread[len(spread) // 4]) - (spread[-1] - base or 0.01))
    axes = _Axes(
        draw, box, "calibration JAQ by trial", (0, max(1, len(values) - 1)), (low, spread[-1])
    )
    y = axes.y(base)
    for x in range(int(axes.left), int(axes.right), 8):
        draw.line((x, y, x + 4, y), GREY, 1)
    best, path = values[0], []
    for index, (value, trial) in enumerate(zip(values, result.trials, strict=True)):
        best = best if trial.pruned else max(best, value)
        path.append((axes.x(index), axes.y(best)))
        pale = trial.pruned or value < low  # given up early, or far below
        axes.dot(index, max(value, low), LIGHT if pale else BLUE)
    if len(path) > 1:
        draw.line(path, ORANGE, 2)
    for index in sorted({0, (len(values) - 1) // 2, len(values) - 1}):
        axes.label(index, str(index + 1))
    right = box[2]
    draw.text((right, box[1]), f"c = 1: {base:.4f}", GREY, _font(13), anchor="ra")
    draw.text((right - 120, box[1]), f"best: {best:.4f}", ORANGE, _font(13), anchor="ra")


def _coefficient_plot(draw, box, result: CalibrationResult) -> None:
    curves = (("c_x", result.best.c_x, BLUE), ("c_eps", result.best.c_eps, ORANGE))
    every = [1.0, *result.best.c_x, *result.best.c_eps]
    steps = len(result.best.c_x)
    title = "best coefficients by step" + (
        " (guarded: 1 is used)" if result.verdict.keep_identity else ""
    )
    axes = _Axes(
        draw,
        box,
        title,
        (0, max(1, steps - 1)),
        (min(*every, 0.99) - 0.01, max(*every, 1.01) + 0.01),
    )
    draw.line((axes.left, axes.y(1), axes.right, axes.y(1)), GREY, 1)
    for offset, (name, values, colour) in zip((-11, 11), curves, strict=True):
        points = [(axes.x(i), axes.y(v)) for i, v in enumerate(values)]
        if steps > 1:
            draw.line(points, colour, 2)
        for i, value in enumerate(values):
            axes.dot(i, value, colour, 4)
            if steps <= 8:
                other = curves[1 if name == "c_x" else 0][1][i]
                side = -13 if value > other or (value == other and offset < 0) else 13
                anchor = "mm" if 0 < i < steps - 1 else ("lm" if i == 0 else "rm")
                draw.text(
                    (axes.x(i), axes.y(value) + side), f"{value:.3f}", colour, _font(12), anchor
                )
        draw.text(
            (box[2] + (-56 if name == "c_x" else 0), box[1]), name, colour, _font(14), anchor="ra"
        )
    for i in range(steps):
        if steps <= 16 or i in (0, steps - 1):
            axes.label(i, str(i + 1))


def _samples(image, draw, y: int, samples: Sequence[Sample]) -> None:
    count = len(samples)
    column = (WIDTH - 2 * MARGIN - GAP * (count - 1)) // count
    draw.text(
        (MARGIN, y), "held-out images, c = 1 and best: worst, median and best gain", INK, _font(16)
    )
    for index, sample in enumerate(samples):
        x = MARGIN + index * (column + GAP)
        size = min(SAMPLE_SIZE, (column - 6) // 2)
        for k, picture in enumerate((sample.before, sample.after)):
            height = max(1, picture.height * size // picture.width)
            fitted = picture.convert("RGB").resize((size, height), Image.Resampling.LANCZOS)
            image.paste(fitted, (x + k * (size + 6), y + 28))
        below = y + 28 + height + 4
        colour = GREEN if sample.gain > 0 else ORANGE
        draw.text((x, below), f"JAQ {sample.gain:+.3f}", colour, _font(13))
        for line_index, line in enumerate(_wrap(draw, sample.prompt, column, 12)[:2]):
            draw.text((x, below + 17 + 14 * line_index), line, GREY, _font(12))
