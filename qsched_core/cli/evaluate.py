"""``python -m qsched_core.evaluate``: what quantization and a schedule do to a plain-torch model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..evaluation import SOURCE_BYTES, Arm, Progress, evaluate, usable_spaces
from ..evaluation.picture import report_picture
from ..evaluation.table import images_csv, report_text, summary_csv
from ..files import write_atomic
from ..schedule import QSchedule
from ..source import check_reference
from ..task import TaskSource, load_task
from ..text import said
from ..trajectory import Candidate
from .common import check_outputs, device_of, objective_of, parser, placement, prompts_of, run, say

BASELINE = "baseline"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("evaluate", "Score a model without and with a schedule on the held-out prompts.")
    made.add_argument(
        "--reference-task", metavar="MODULE:FUNCTION", help="the same model, unquantized"
    )
    made.add_argument("--schedule", type=Path, metavar="FILE.json")
    made.add_argument(
        "--reference-images", type=Path, metavar="FOLDER", help="for the Frechet distance"
    )
    made.add_argument("--on", default="heldout", choices=("heldout", "calibration"))
    made.add_argument("--csv", type=Path, metavar="FILE.csv", help="every image's scores")
    made.add_argument("--summary", type=Path, metavar="FILE.csv", help="means, gains, distances")
    made.add_argument("--json", type=Path, metavar="FILE.json", help="everything")
    made.add_argument("--picture", type=Path, metavar="FILE.png", help="the report as a picture")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 0, 1 for an error, 2 for bad arguments, 130 when stopped."""
    arguments = arguments_of(argv)
    return run(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    check_outputs([arguments.csv, arguments.summary, arguments.json, arguments.picture])
    schedule = None if arguments.schedule is None else QSchedule.load(arguments.schedule)
    references = None
    if arguments.reference_images is not None:
        references = read_pictures(arguments.reference_images)
    prompts = getattr(prompts_of(arguments), arguments.on)
    device = device_of(arguments.device)
    objective = objective_of(arguments, device)
    task = load_task(arguments.task, device)
    source = TaskSource(task, SOURCE_BYTES)
    scheduled, note, differences = None, "", ""
    if schedule is not None:
        scheduled, note = schedule.over(source.trajectory)
        if schedule.trajectory.is_uniform and not schedule.is_identity:
            differences = schedule.trajectory.differences(task.solver, task.options)
    arms = arms_of(source, scheduled)
    if arguments.reference_task is not None:
        reference = TaskSource(load_task(arguments.reference_task, device), SOURCE_BYTES)
        check_reference(source, reference)
        arms.insert(0, Arm(BASELINE, reference, Candidate.identity(reference.trajectory)))
    spaces, notes = usable_spaces(objective.encoder, placement(device))
    found = evaluate(
        arms,
        prompts,
        objective,
        spaces,
        arguments.folder,
        baseline=None if arguments.reference_task is None else BASELINE,
        references=references,
        notes=notes,
        on_progress=_tell,
    )
    content = found.to_dict() | {"objective": objective.describe(), "task": source.describe()}
    for path, data in (
        (arguments.csv, lambda: images_csv(found)),
        (arguments.summary, lambda: summary_csv(found)),
        (arguments.json, lambda: json.dumps(content, indent=1)),
        (arguments.picture, lambda: _png(report_picture(found))),
    ):
        if path is not None:
            write_atomic(path, data())
    say(report_text(found))
    if differences:
        say(f"schedule: it was learned for {differences}")
    if note:
        say(f"schedule: {note}")


def arms_of(source: TaskSource, scheduled: Candidate | None) -> list[Arm]:
    """The task alone, and with a schedule that changes something."""
    plain = Candidate.identity(source.trajectory)
    arms = [Arm("quantized", source, plain)]
    if scheduled is not None and scheduled != plain:
        arms.append(Arm("schedule", source, scheduled, "quantized + schedule"))
    return arms


def read_pictures(folder: Path) -> torch.Tensor:
    """The pictures of a folder [n, height, width, 3] in [0, 1], in the order of their names.

    All take the first one's size.  ValueError for a folder without pictures, or one that is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"--reference-images {folder} is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"--reference-images {folder} has no pictures ({', '.join(PICTURES)})")
    made, size = [], None
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} can't be read as a picture: {said(error)}") from None
        size = size or picture.size
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        made.append(torch.from_numpy(np.asarray(picture).copy()))
    return torch.stack(made).float() / 255


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _tell(progress: Progress) -> None:
    if not progress.resumed:
        say(f"{progress.arm.label}: {progress.done} of {progress.total} images")
