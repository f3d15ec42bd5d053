"""``python -m qsched_core.calibrate_weights``: round a plain-torch model's weights for its inputs."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomic
from ..formats.policy import Policy, parse_overrides
from ..rounding import (
    GRIDS,
    LADDER,
    WEIGHING,
    BlockDone,
    Budget,
    Limits,
    RoundingError,
    RoundingSettings,
    TaskSubject,
    budget_picture,
    calibrate_to_size,
    calibrate_weights,
    figures,
    grid_of,
    report,
    sized_figures,
    sized_report,
)
from ..task import load_task
from .common import check_outputs, device_of, objective_of, parser, prompts_of, run, say


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(
        "calibrate_weights", "Round the weights of an unquantized model for the inputs they get."
    )
    made.add_argument("--out", type=Path, required=True, metavar="WEIGHTS.safetensors")
    made.add_argument("--json", type=Path, metavar="FILE.json", help="provenance and every figure")
    group = made.add_argument_group("rounding")
    group.add_argument("--format", default="int2", help=f"one of {', '.join(GRIDS)}")
    sizes = group.add_mutually_exclusive_group()
    sizes.add_argument(
        "--bits",
        type=float,
        help="formats by layer instead of --format, so that the quantized layers take so many bits a "
        "weight",
    )
    sizes.add_argument(
        "--gb", type=float, help="the same, so that the whole model takes so many GB (1e9 bytes)"
    )
    group.add_argument(
        "--ladder", default=",".join(LADDER), help="the formats that may be mixed (%(default)s)"
    )
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a mix with the uniform formats next to it, which are calibrated as well",
    )
    group.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="with --bits or --gb: how formats were chosen",
    )
    group.add_argument("--layers", default="", help='overrides, as "fc2=nf4; proj=keep"')
    group.add_argument(
        "--states-per-prompt",
        type=int,
        default=0,
        help="random steps of each calibration prompt (0: all); many prompts with few steps are best",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of those steps")
    defaults = RoundingSettings()
    group.add_argument("--damp", type=float, default=defaults.damp, help="of GPTQ")
    group.add_argument("--target-damp", type=float, default=defaults.target_damp)
    group.add_argument(
        "--target",
        type=float,
        default=defaults.target,
        help="how much of the earlier layers' error a layer takes up, 0 to 1",
    )
    group.add_argument("--rounds", type=int, default=defaults.rounds, help="of improvement")
    group.add_argument("--sweeps", type=int, default=defaults.sweeps, help="of descent in a round")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 0, 1 for an error, 2 for bad arguments, 130 when stopped."""
    arguments = arguments_of(argv)
    return run(lambda: _calibrate(arguments))


def _calibrate(arguments: argparse.Namespace) -> None:
    settings = RoundingSettings(
        **{name: getattr(arguments, name) for name in RoundingSettings().to_dict()}
    )
    sized = arguments.bits is not None or arguments.gb is not None
    if arguments.picture is not None and not sized:
        raise RoundingError("--picture shows how formats were chosen: give --bits or --gb")
    grid_of(arguments.format)
    ladder = tuple(form.strip() for form in arguments.ladder.split(","))
    budget = Budget(arguments.bits, arguments.gb, ladder) if sized else None
    policy = Policy(arguments.format, parse_overrides(arguments.layers))
    check_outputs([arguments.out, arguments.json, arguments.picture])
    prompts = prompts_of(arguments)
    device = device_of(arguments.device)
    scored = arguments.scorer is not None or arguments.architecture
    objective = objective_of(arguments, device) if scored else None
    subject = TaskSubject(load_task(arguments.task, device))
    shared = {
        "settings": settings,
        "states_per_prompt": arguments.states_per_prompt,
        "seed": arguments.seed,
        "measure": objective,
        "on_block": _tell,
        "limits": Limits(tell=say),
    }
    told, more = "", {}
    if budget is None:
        result = calibrate_weights(subject, prompts, policy, arguments.folder, **shared)
    else:
        found = calibrate_to_size(
            subject,
            prompts,
            policy,
            arguments.folder,
            budget,
            compare=arguments.compare,
            on_part=_weighed,
            **shared,
        )
        result, more = found.result, {"size": sized_figures(found)}
        told = f"{sized_report(found)}\n"
        if arguments.picture is not None:
            picture = io.BytesIO()
            budget_picture(found, "Formats by layer").save(picture, "PNG")
            write_atomic(arguments.picture, picture.getvalue())
    result.weights.save(arguments.out)
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(figures(result) | more, indent=1))
    say(f"{told}{report(result)}\nweights: {arguments.out}")


def _weighed(part: str, done: int, total: int) -> None:
    if part == WEIGHING:
        say(f"{done} of {total} layers weighed")


def _tell(done: BlockDone) -> None:
    if not done.resumed:
        left = f", about {done.seconds_left:.0f} s left" if done.index + 1 < done.total else ""
        say(f"block {done.index + 1} of {done.total}, {done.name}{left}")
