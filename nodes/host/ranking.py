"""Pictures to be ranked by eye, numbered, inside ComfyUI (0.30.0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ...qsched_core.canvas import GREY, INK, Canvas
from ...qsched_core.search.ranking import Ranked

WIDTH, MARGIN, GAP, HEAD = 1200, 24, 10, 30
MOST_SIDE, SMALL_SIDE = 420, 240  # pixels of a picture on the sheet; small ones have a row each


def sheet(pictures: torch.Tensor, ranked: Ranked, prompts: Sequence[str]) -> Image.Image:
    """Pictures [candidates, prompts, height, width, 3] in [0, 1] as numbered cells, and what to do.

    One prompt: cells side by side; several: a row for each candidate, a column for each prompt.
    """
    count, columns = pictures.shape[:2]
    across = columns if columns > 1 else min(3, count)
    most = MOST_SIDE if columns == 1 else SMALL_SIDE
    side = min(most, (WIDTH - 2 * MARGIN - GAP * (across - 1) - HEAD) // across)
    height = side * pictures.shape[2] // pictures.shape[3]
    pen = Canvas(WIDTH)
    y = pen.paragraph(MARGIN, MARGIN, ranked.note, WIDTH - 2 * MARGIN, INK, 18, 24) + 8
    for candidate in range(count):
        label = ranked.round.labels[candidate]
        title = f"{candidate + 1}" + (f"  ({label})" if label else "")
        for column in range(columns):
            place = column if columns > 1 else candidate % across
            x = MARGIN + place * (side + GAP)
            if place == 0 and (candidate or column):
                y += HEAD + height + GAP
            pen.text(x, y, title if column == 0 else "", INK, 24, width=side)
            made = (pictures[candidate, column] * 255).round().to(torch.uint8).cpu().numpy()
            pen.picture(x, y + HEAD, Image.fromarray(made), side, height)
    y += HEAD + height + GAP
    for column, prompt in enumerate(prompts if columns > 1 else ()):
        pen.text(MARGIN + column * (side + GAP), y, prompt, GREY, 14, width=side)
    return pen.finish(y + (HEAD if columns > 1 else 0) + MARGIN)
