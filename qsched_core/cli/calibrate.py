"""``python -m qsched_core.calibrate``: learn a schedule for a plain-torch model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from ..calibration import calibrate
from ..calibration.report import report_picture, report_text
from ..files import write_atomic
from ..optional import require
from ..search import PRUNERS, STRATEGIES, CalibrationSettings, Monitor, Progress
from ..study import COMMAND_LINE, StudyPlace, check_shared
from ..task import TaskSource, load_task
from .common import check_outputs, device_of, objective_of, parser, prompts_of, run, say


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("calibrate", "Learn the coefficients of a quantized few-step model.")
    made.add_argument("--out", type=Path, required=True, metavar="SCHEDULE.json")
    made.add_argument("--picture", type=Path, metavar="FILE.png", help="the report as a picture")
    made.add_argument(
        "--reference-task",
        metavar="MODULE:FUNCTION",
        help="the same model, not quantized: control and pre-check",
    )
    group = made.add_argument_group("search")
    group.add_argument("--search", default="gp", choices=STRATEGIES)
    group.add_argument("--budget", type=int, default=0, help="candidates; 0: the search's own")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--low", type=float, help="least coefficient of a ramp")
    group.add_argument("--high", type=float, help="greatest coefficient of a ramp")
    group.add_argument("--radius", type=float, default=0.1, help="of the refinement by step")
    group.add_argument("--ends", action="store_true", help="search where the ramps end, too")
    group.add_argument("--pruner", "--fidelity", default="full", choices=PRUNERS)
    group.add_argument("--proposals", type=int, default=1, help="candidates proposed at a time")
    group.add_argument(
        "--grid",
        type=int,
        default=0,
        help="steps of the path that levels-dp chooses noise levels from; 0: 32",
    )
    group.add_argument("--no-guard", action="store_true", help="keep c even if it may not help")
    group = made.add_argument_group("several machines at one search")
    group.add_argument(
        "--storage", default="", metavar="URL", help="database that they share, or env:VARIABLE"
    )
    group.add_argument("--study", default="", help="the name under which they find each other")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 0, 1 for an error, 2 for bad arguments, 130 when stopped."""
    arguments = arguments_of(argv)
    return run(lambda: _calibrate(arguments))


def _calibrate(arguments: argparse.Namespace) -> None:
    settings = CalibrationSettings(
        strategy=arguments.search,
        budget=arguments.budget,
        seed=arguments.seed,
        guard=not arguments.no_guard,
        low=arguments.low,
        high=arguments.high,
        radius=arguments.radius,
        ends=arguments.ends,
        pruner=arguments.pruner,
        proposals=arguments.proposals,
        grid=arguments.grid,
    )
    database = COMMAND_LINE.database(arguments.storage)
    if database is not None:
        check_shared(database, arguments.study)
    optuna = require("optuna", "the search", "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # trials are told here
    check_outputs([arguments.out, arguments.picture])
    prompts = prompts_of(arguments)
    device = device_of(arguments.device)
    objective = objective_of(arguments, device)
    source, reference = TaskSource(load_task(arguments.task, device)), None
    if arguments.reference_task:
        reference = TaskSource(load_task(arguments.reference_task, device))
    result = calibrate(
        source,
        objective,
        prompts,
        settings,
        StudyPlace(arguments.folder, database, arguments.study),
        reference,
        Monitor(_tell),
    )
    result.schedule.save(arguments.out)
    if arguments.picture is not None:
        buffer = BytesIO()
        report_picture(result).save(buffer, "PNG")
        write_atomic(arguments.picture, buffer.getvalue())
    say(f"{report_text(result)}\nschedule: {arguments.out}")


def _tell(progress: Progress) -> None:
    if not progress.resumed:
        say(
            f"trial {progress.trial.number + 1} of {progress.total}: JAQ {progress.trial.value:.4f}, "
            f"best {progress.best.value:.4f}, about {progress.seconds_left:.0f} s left"
        )
