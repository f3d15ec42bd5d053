"""What the commands share: arguments, the objective, prompts from files, errors in one line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..files import check_room
from ..objective import QUALITY_WEIGHT, Objective
from ..prompts import CalibrationPrompts, bundled_prompts, parse_prompts, read_prompts
from ..scorers import SCORERS, Placement, ScorerError, load_file, load_named
from ..text import said

FAILED, STOPPED = 1, 130


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Arguments of every command: task, device, prompts, objective, folder."""
    made = argparse.ArgumentParser(f"python -m qsched_core.{program}", description=description)
    made.add_argument(
        "--task",
        required=True,
        metavar="MODULE:FUNCTION",
        help="a function of the device that returns a qsched_core.task.Task; or FILE.py:FUNCTION",
    )
    made.add_argument("--device", default="cpu", help="for example cuda, cuda:1 (default: cpu)")
    made.add_argument(
        "--folder",
        type=Path,
        default=Path("qsched-studies"),
        help="keeps what is finished, so that the same command goes on (default: %(default)s)",
    )
    group = made.add_argument_group("prompts (default: the bundled ones)")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON {"calibration": [...], "heldout": [...]}, or text with one prompt a line: the '
        "held-out ones after a line [heldout], or in --heldout",
    )
    group.add_argument(
        "--heldout", type=Path, metavar="FILE", help="text, one held-out prompt a line"
    )
    group.add_argument("--prompt-seed", type=int, default=0, help="of the initial noise")
    group = made.add_argument_group("objective")
    group.add_argument("--scorer", type=Path, metavar="FILE", help="weights of an open_clip model")
    group.add_argument(
        "--architecture",
        default="",
        help="open_clip's name of the model in FILE; without FILE, architecture/weights to be loaded "
        "by name",
    )
    group.add_argument(
        "--allow-download",
        action="store_true",
        help="let open_clip and pyiqa download what the scorers named here need",
    )
    group.add_argument("--quality", default="clip_iqa", help="clip_iqa or pyiqa:METRIC")
    group.add_argument("--quality-weight", type=float, default=QUALITY_WEIGHT, help="k of JAQ")
    group.add_argument(
        "--formula", default="", help="a preset such as aq+hps, or a sum: clip + 2*clip_iqa"
    )
    for entry in SCORERS.values():
        if entry.needs_file:
            group.add_argument(
                f"--{entry.name}-weights", type=Path, metavar="FILE", help=entry.licence
            )
    return made


def device_of(name: str) -> torch.device:
    """The device called ``name``; ValueError if it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # a torch without CUDA says so with an AssertionError
        raise ValueError(f"device={name!r} can't be used: {said(error)}") from None
    return device


def placement(device: torch.device) -> Placement:
    """Keeps every scorer on ``device``."""

    def place(module: torch.nn.Module) -> torch.device:
        module.to(device)
        return device

    return place


def objective_of(arguments: argparse.Namespace, device: torch.device) -> Objective:
    """The objective that the arguments name, on ``device``; ScorerError."""
    place = placement(device)
    if arguments.scorer is not None:
        encoder = load_file(
            arguments.scorer, arguments.architecture, place, arguments.allow_download
        )
    elif arguments.architecture:
        encoder = load_named(arguments.architecture, arguments.allow_download, place)
    else:
        raise ScorerError(
            "no scorer: give --scorer FILE, or --architecture NAME/WEIGHTS with --allow-download"
        )
    own = {
        entry.name: getattr(arguments, f"{entry.name}_weights")
        for entry in SCORERS.values()
        if entry.needs_file
    }
    files = {name: path for name, path in own.items() if path is not None}
    return Objective(
        encoder,
        arguments.quality,
        arguments.quality_weight,
        place,
        arguments.formula,
        files,
        arguments.allow_download,
    )


def prompts_of(arguments: argparse.Namespace) -> CalibrationPrompts:
    """The prompts that the arguments name; ValueError names the file and what is wrong."""
    seed = arguments.prompt_seed
    if arguments.prompts is None:
        if arguments.heldout is not None:
            raise ValueError("--heldout needs --prompts, the calibration prompts")
        return bundled_prompts(seed)
    if arguments.heldout is None:
        return CalibrationPrompts.of(*read_prompts(arguments.prompts), seed)
    if arguments.prompts.suffix.lower() == ".json":
        raise ValueError(f"{arguments.prompts} has both lists; leave --heldout out")
    parts = [
        parse_prompts(_read(path), str(path)) for path in (arguments.prompts, arguments.heldout)
    ]
    return CalibrationPrompts.of(*parts, seed)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None


def check_outputs(paths: Sequence[Path | None]) -> None:
    """Every file that is asked for can be written, before anything is computed.

    ValueError for a folder's name, DiskError where the disk refuses.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give a file name")
        check_room(path)


def say(text: str) -> None:
    """A line to the user."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(command: Callable[[], None]) -> int:
    """The exit code of a command: 0, 1 after an error (one line), 130 after Ctrl+C."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        command()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on where it was\n")
        return STOPPED
    except (ValueError, OSError, ImportError) as error:
        # what the pack raises for input, disk and missing packages
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return FAILED
    return 0
