"""Calibrated weights as one picture: what they are worth, layer by layer and in pictures."""

from __future__ import annotations

from PIL import Image

from ..canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, Page
from .proof import Arm
from .run import WeightsResult, verdict

WIDTH, MARGIN, NAME, LEFT = 1200, 32, 150, 84
HEIGHT = 130  # pixels of a chart
LARGEST = 340  # of a picture's width
COLUMNS = ("unquantized", "plain rounding", "calibrated")


def report_picture(result: WeightsResult, title: str) -> Image.Image:
    """RGB, 1200 wide: the verdict, the held-out figures, every layer's error, and the samples."""
    page = Page(WIDTH, MARGIN)
    page.at(MARGIN, title, size=26, width=WIDTH - 2 * MARGIN)
    page.space(40)
    page.write(verdict(result), GREEN if result.calibrated else ORANGE, 18)
    _figures(page, result)
    _layers(page, result)
    if result.samples:
        _samples(page, result)
    return page.finish(page.y + MARGIN)


def _figures(page: Page, result: WeightsResult) -> None:
    """A row a figure, a column an arm."""
    proof = result.proof
    page.space()
    left = MARGIN + 2 * NAME
    width = (WIDTH - MARGIN - left) / len(COLUMNS)
    page.at(MARGIN, f"on {len(proof.plain.distance)} held-out prompts", GREY)
    for k, label in enumerate(COLUMNS):
        page.at(left + k * width, label, GREY)
    page.y += 26
    page.rule()

    def row(label: str, first: str, values: tuple[str, str]) -> None:
        page.at(MARGIN, label)
        for k, text in enumerate((first, *values)):
            page.at(left + k * width, text)
        page.y += 26

    arms: tuple[Arm, Arm] = (proof.plain, proof.calibrated)
    row("distance to the unquantized latents", "0", tuple(f"{arm.mean:.5f}" for arm in arms))
    row("fine detail", "100 %", tuple(f"{arm.mean_detail:.1%}" for arm in arms))
    if proof.reference_jaq is not None:
        mean = sum(proof.reference_jaq) / len(proof.reference_jaq)
        row("JAQ", f"{mean:.3f}", tuple(f"{sum(a.jaq) / len(a.jaq):.3f}" for a in arms))
    page.space()


def _layers(page: Page, result: WeightsResult) -> None:
    """Columns of every calibrated layer's output error, plain rounding's behind it."""
    rows = [
        (name, layer.errors)
        for name, layer in result.weights.layers.items()
        if layer.errors is not None
    ]
    if not rows:
        return
    page.at(MARGIN, "relative output error of each layer: calibrated, and rounded plainly (grey)")
    top = page.y + 34
    bottom, right = top + HEIGHT, WIDTH - MARGIN
    highest = max(max(errors) for _, errors in rows) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = bottom - HEIGHT * share
        page.line([(LEFT, y), (right, y)], FAINT)
        page.text(LEFT - 10, y, f"{highest * share:.3g}", INK, 14, "rm")
    step = (right - LEFT) / len(rows)
    for i, (_, errors) in enumerate(rows):
        x = LEFT + i * step
        end = max(x + 1, x + step - (1 if step > 3 else 0))
        for error, color in zip(errors, (GREY, BLUE), strict=True):
            if error > 0:
                page.bar(x, bottom - HEIGHT * error / highest, end, bottom, color)
    half = (right - LEFT) / 2 - 10
    page.text(LEFT, bottom + 6, rows[0][0], GREY, 13, width=half)
    page.text(right, bottom + 6, rows[-1][0], GREY, 13, "ra", half)
    page.y = bottom + 40


def _samples(page: Page, result: WeightsResult) -> None:
    """A row a prompt: unquantized, plain, calibrated."""
    page.write(
        "the held-out prompts whose distance changed worst, in the middle, and best", GREY, 14
    )
    page.space(4)
    width = (WIDTH - 2 * MARGIN - NAME) / len(COLUMNS)
    for k, label in enumerate(COLUMNS):
        page.at(MARGIN + NAME + k * width, label)
    page.y += 26
    size = round(min(LARGEST, width - 16))
    for sample in result.samples:
        pictures = [Image.fromarray(each.numpy()) for each in sample.pictures]
        height = max(1, round(pictures[0].height * size / pictures[0].width))
        top = page.y
        page.at(MARGIN, f"{sample.change:+.5f}", GREEN if sample.change < 0 else ORANGE, 16)
        most = max(1, (height - 24) // 17)
        page.paragraph(MARGIN, top + 24, sample.prompt, NAME - 16, GREY, 13, 17, most)
        for k, picture in enumerate(pictures):
            page.picture(MARGIN + NAME + k * width, top, picture, size, height)
        page.y = top + height + 12
