"""``python -m qsched_core.calibrate_weights``: round a plain-torch model's weights for its inputs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomic
from ..formats.policy import Policy, parse_overrides
from ..rounding import (
    GRIDS,
    BlockDone,
    RoundingSettings,
    TaskSubject,
    calibrate_weights,
    figures,
    grid_of,
    report,
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
    grid_of(arguments.format)
    policy = Policy(arguments.format, parse_overrides(arguments.layers))
    check_outputs([arguments.out, arguments.json])
    prompts = prompts_of(arguments)
    device = device_of(arguments.device)
    scored = arguments.scorer is not None or arguments.architecture
    objective = objective_of(arguments, device) if scored else None
    result = calibrate_weights(
        TaskSubject(load_task(arguments.task, device)),
        prompts,
        policy,
        arguments.folder,
        settings=settings,
        states_per_prompt=arguments.states_per_prompt,
        seed=arguments.seed,
        measure=objective,
        on_block=_tell,
    )
    result.weights.save(arguments.out)
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(figures(result), indent=1))
    say(f"{report(result)}\nweights: {arguments.out}")


def _tell(done: BlockDone) -> None:
    if not done.resumed:
        left = f", about {done.seconds_left:.0f} s left" if done.index + 1 < done.total else ""
        say(f"block {done.index + 1} of {done.total}, {done.name}{left}")
