"""The whole job in a real headless ComfyUI: ``python dev.py demo``.

For a 4-bit and a 2-bit format: learn a schedule with the shipped workflow, then score prompts that
neither search nor guard saw, without and with it.  The control runs the same search on the
unquantized model: what it gains there is sharpening, not repair.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from devtools.server import ComfyServer, ServerError, device_args
from qsched_core.canvas import Canvas
from qsched_core.files import write_atomic
from qsched_core.statistics import mean_interval, paired_interval

from .build import build_models
from .graphs import UNQUANTIZED, evaluate, learn
from .prompts import demo_prompts

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".host" / "demo"
FORMATS = ("nf4", "int2")
CONTROLLED = "int2"  # the format whose gain is held against the control's
SEARCH = "gp"  # on 20 prompts, refining every step on its own finds what does not carry over
TEST_SEED = 20_000
FAST_BF16 = ("amx_bf16", "avx512_bf16")  # torch's names for the instructions
SHOWN = 8
CELL = 144


@dataclass
class Row:
    """One line of the table: a model, with or without a learned schedule."""

    name: str
    weight_bytes: int
    computes_in: str
    calibration_jaq: float
    test: dict  # per-prompt "jaq", "alignment", "quality"
    nfe: int
    seconds: float
    pictures: list = field(default_factory=list, repr=False)
    gain: dict | None = None  # paired, against the same model without a schedule

    def interval(self):
        return mean_interval(self.test["jaq"])


class Demo:
    """Posts the demo's graphs to one server and collects what they return."""

    def __init__(self, server: ComfyServer):
        self.server = server
        self.prompts = demo_prompts()

    def learn(self, weight_format: str, guard: bool, name: str) -> dict:
        """The calibrator's report of one run of the shipped workflow."""
        graph = learn(weight_format, SEARCH, guard, name)
        outputs = self.server.run(graph, timeout=3600)["outputs"]
        return json.loads(outputs["4"]["text"][0])

    def score(self, weight_format: str, schedule: str | None, prefix: str) -> tuple[dict, list]:
        """Scores on the test prompts, and the first pictures."""
        graph = evaluate(
            weight_format, schedule, self.prompts.test, TEST_SEED, SHOWN, f"demo/{prefix}"
        )
        outputs = self.server.run(graph, timeout=3600)["outputs"]
        pictures = [
            Image.open(io.BytesIO(self.server.image(entry))).convert("RGB")
            for entry in outputs["6"]["images"]
        ]
        return json.loads(outputs["4"]["text"][0]), pictures

    def row(self, name, weight_format, schedule, calibration_jaq, spent=0, seconds=0.0) -> Row:
        prefix = name.replace(" ", "_").replace("+", "with")
        content, pictures = self.score(weight_format, schedule, prefix)
        model = content["provenance"]["model"]
        return Row(
            name,
            model["weight_bytes"],
            model["compute_dtype"],
            calibration_jaq,
            content["scores"],
            spent,
            seconds,
            pictures,
        )


def vae_arguments(capabilities: Mapping[str, object]) -> tuple[str, ...]:
    """ComfyUI's argument for a VAE in bf16, where a CPU has instructions for it.

    ComfyUI's own choice on every CPU is fp32, which takes 2 to 5 times as long there.
    """
    return ("--bf16-vae",) if any(capabilities.get(name) for name in FAST_BF16) else ()


def server_options() -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and environment that make the server quick on this machine."""
    import torch

    arguments = device_args()
    if "--cpu" in arguments:
        # torch's own attention: the model takes an eighth less time than with ComfyUI's choice
        arguments += ("--use-pytorch-cross-attention",)
        arguments += vae_arguments(torch.cpu.get_capabilities())
    # glibc gives big blocks back to the system at once; faulting them in again takes long
    return arguments, {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def run(demo: Demo, say) -> tuple[list[Row], dict]:
    """All rows of the table, and the rest of the report."""
    say("the control: the same search on the unquantized model")
    control = demo.learn(UNQUANTIZED, guard=False, name="demo-control")
    rows = [demo.row(UNQUANTIZED, UNQUANTIZED, None, control["calibration"]["before"]["jaq"])]
    details = {"control": control}
    for weight_format in FORMATS:
        name = f"demo-{weight_format}"
        say(f"{weight_format}: learning a schedule")
        report = demo.learn(weight_format, guard=True, name=name)
        details[weight_format] = report
        say(f"{weight_format}: {report['text']}")
        before = demo.row(
            weight_format, weight_format, None, report["calibration"]["before"]["jaq"]
        )
        kept = report["guarded"]
        after = demo.row(
            f"{weight_format} + Q-Sched",
            weight_format,
            f"{name}.json",
            report["calibration"]["before" if kept else "after"]["jaq"],
            report["nfe"],
            report["seconds"],
        )
        after.gain = paired_interval(before.test["jaq"], after.test["jaq"]).to_dict()
        rows += [before, after]
    say("scoring the control")
    # the quantized model first: it is still loaded
    transferred, _ = demo.score(CONTROLLED, "demo-control.json", "control_on_quantized")
    controlled, _ = demo.score(UNQUANTIZED, "demo-control.json", "control")
    learned, _ = demo.score(UNQUANTIZED, f"demo-{CONTROLLED}.json", "learned_on_unquantized")
    base = {row.name: row.test["jaq"] for row in rows}
    gain = next(row.gain for row in rows if row.name == f"{CONTROLLED} + Q-Sched")
    details["control_gains"] = {
        "searched on the unquantized model, scored on it": paired_interval(
            base[UNQUANTIZED], controlled["scores"]["jaq"]
        ).to_dict(),
        f"searched on the unquantized model, scored on {CONTROLLED}": paired_interval(
            base[CONTROLLED], transferred["scores"]["jaq"]
        ).to_dict(),
        f"searched on {CONTROLLED}, scored on the unquantized model": paired_interval(
            base[UNQUANTIZED], learned["scores"]["jaq"]
        ).to_dict(),
    }
    details["beyond_control"] = _difference_of_gains(
        base[UNQUANTIZED], controlled["scores"]["jaq"], rows
    )
    details["gain"] = gain
    return rows, details


def _difference_of_gains(control_before, control_after, rows: list[Row]) -> dict:
    """Gain of the controlled format minus the control's, prompt by prompt."""
    by_name = {row.name: row.test["jaq"] for row in rows}
    before, after = by_name[CONTROLLED], by_name[f"{CONTROLLED} + Q-Sched"]
    control = [b - a for a, b in zip(control_before, control_after, strict=True)]
    gained = [b - a for a, b in zip(before, after, strict=True)]
    return paired_interval(control, gained).to_dict()


def table(rows: list[Row], details: dict) -> str:
    head = (
        f"{'':16}{'weights':>10}{'JAQ calib.':>12}{'JAQ test [95 % interval]':>30}"
        f"{'gain on test':>28}{'NFE':>13}{'seconds':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        i = row.interval()
        gain = ""
        if row.gain is not None:
            gain = f"{row.gain['mean']:+.3f} [{row.gain['low']:+.3f}, {row.gain['high']:+.3f}]"
        lines.append(
            f"{row.name:16}{row.weight_bytes / 1e6:>8.1f} MB{row.calibration_jaq:>12.3f}"
            f"{f'{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]':>30}{gain:>28}"
            f"{row.nfe or '':>13}{f'{row.seconds:.0f}' if row.seconds else '':>9}"
        )
    lines.append("")
    lines.append(f"control gains on the {len(rows[0].test['jaq'])} test prompts:")
    for what, gain in details["control_gains"].items():
        lines.append(f"  {what}: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
    beyond = details["beyond_control"]
    lines.append(
        f"{CONTROLLED}'s gain beyond the control's: {beyond['mean']:+.3f} "
        f"[{beyond['low']:+.3f}, {beyond['high']:+.3f}]"
    )
    return "\n".join(lines)


def precisions(rows: list[Row], arguments: Sequence[str]) -> str:
    """What the models computed in, as they say themselves, and the VAE."""
    models = ", ".join(f"{row.name} {row.computes_in}" for row in rows if row.gain is None)
    vae = "bfloat16" if "--bf16-vae" in arguments else "as ComfyUI chooses (float32 on a CPU)"
    return f"computed in: {models}; VAE {vae}"


def contact_sheet(rows: list[Row], prompts: tuple[str, ...]) -> bytes:
    """PNG: a row of pictures a model, the same prompts and seeds in every row."""
    label, caption = 150, 66
    sheet = Canvas(label + SHOWN * CELL, paper="white")
    for column, prompt in enumerate(prompts[:SHOWN]):
        sheet.paragraph(label + column * CELL + 4, 4, prompt, CELL - 8, "black", 12, 15, most=4)
    for index, row in enumerate(rows):
        top = caption + index * CELL
        lines = (row.name, f"{row.weight_bytes / 1e6:.1f} MB", f"JAQ {row.interval().mean:.3f}")
        y = top + 30
        for text in lines:
            y = sheet.paragraph(8, y, text, label - 16, "black", 15, 22, most=2)
        for column, picture in enumerate(row.pictures):
            x = label + column * CELL + 2
            sheet.picture(x, top + 2, picture, CELL - 4, CELL - 4)
    height = caption + len(rows) * CELL
    buffer = io.BytesIO()
    sheet.finish(height).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=BASE, help="the server's own folder")
    args = parser.parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    try:
        say("building the demo checkpoint, and starting ComfyUI")
        with ThreadPoolExecutor(1) as beside:
            built = beside.submit(build_models, args.base / "models")
            arguments, environment = server_options()
            with ComfyServer(
                args.comfyui, args.base, extra_args=arguments, environment=environment
            ) as server:
                built.result()
                demo = Demo(server)
                rows, details = run(demo, say)
    except (ServerError, OSError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    report = {
        "rows": [
            {k: v for k, v in vars(row).items() if k != "pictures"}
            | {"test_interval": row.interval().to_dict()}
            for row in rows
        ],
        "prompts": asdict(demo.prompts),
        "seconds": seconds,
        "server_arguments": arguments,
        **details,
    }
    write_atomic(args.out / "report.json", json.dumps(report, indent=1))
    write_atomic(args.out / "contact_sheet.png", contact_sheet(rows, demo.prompts.test))
    for weight_format in FORMATS:
        schedule = details[weight_format]["schedule"]
        write_atomic(args.out / f"schedule-{weight_format}.json", schedule)
    print(
        f"\n{table(rows, details)}\n\n{precisions(rows, arguments)}\n{seconds:.0f} s in all; files are in {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
