"""The whole job in a real headless ComfyUI: ``python dev.py demo``.

In a 2-bit and a 4-bit format: quantize plainly, calibrate the weights, and score prompts that nothing
was fitted to.  In 2 bits also learn a schedule for both, with the shipped workflow.  The control runs
the same search on the unquantized model: what it gains there is sharpening, not repair.
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

import numpy as np
from PIL import Image

from devtools.server import ComfyServer, ServerError, device_args
from qsched_core.canvas import Canvas
from qsched_core.files import write_atomic
from qsched_core.statistics import mean_interval, paired_interval

from .build import build_models
from .graphs import UNQUANTIZED, calibrate_weights, evaluate, learn
from .prompts import demo_prompts

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".host" / "demo"
FORMATS = ("int2", "nf4")
LEARNED = (
    "int2"  # the format that schedules are learned for, with plain and with calibrated weights
)
CALIBRATED, SCHEDULED = " calibrated", " + Q-Sched"  # of a row's name
WEIGHTS_HELDOUT = 64  # prompts that decide between calibrated and plain weights
SEARCH = "gp"  # on 20 prompts, refining every step on its own finds what does not carry over
TEST_SEED = 20_000
FAST_BF16 = ("amx_bf16", "avx512_bf16")  # torch's names for the instructions
SHOWN = 8
CELL = 144


@dataclass
class Row:
    """One line of the table: a model, with or without a learned schedule.

    ``distance`` is the pictures' to the unquantized model's: the root of the mean square, in levels of
    255.  ``gain`` is paired, over the row ``over``.
    """

    name: str
    weight_bytes: int
    computes_in: str
    test: dict  # per-prompt "jaq", "alignment", "quality"
    nfe: int = 0
    seconds: float = 0.0
    pictures: list = field(default_factory=list, repr=False)
    distance: float = 0.0
    gain: dict | None = None
    over: str = ""

    def interval(self):
        return mean_interval(self.test["jaq"])

    def compare(self, other: Row) -> None:
        self.over = other.name
        self.gain = paired_interval(other.test["jaq"], self.test["jaq"]).to_dict()


def distance(pictures: Sequence[Image.Image], wanted: Sequence[Image.Image]) -> float:
    """Root of the mean squared difference of pictures, in levels of 255."""
    pairs = zip(pictures, wanted, strict=True)
    squares = [np.square(np.asarray(a, np.float64) - np.asarray(b)).mean() for a, b in pairs]
    return float(np.sqrt(np.mean(squares)))


class Demo:
    """Posts the demo's graphs to one server and collects what they return."""

    def __init__(self, server: ComfyServer):
        self.server = server
        self.prompts = demo_prompts()
        self.files: dict[str, str] = {}  # of models that were saved, by the rows' names

    def _run(self, graph: dict) -> dict:
        return self.server.run(graph, timeout=3600)["outputs"]

    def calibrate(self, weight_format: str) -> dict:
        """The figures of Calibrate Weights; the model is saved."""
        name, prompts = f"demo-{weight_format}-calibrated", self.prompts
        heldout = prompts.heldout[:WEIGHTS_HELDOUT]
        outputs = self._run(calibrate_weights(weight_format, prompts.weights, heldout, name))
        path = Path(outputs["5"]["text"][0].splitlines()[0])
        self.files[weight_format + CALIBRATED] = path.name
        content = json.loads(outputs["4"]["text"][0])
        return content | {"picture": self._pictures(outputs["6"])[0]}

    def learn(self, model: str, guard: bool, name: str) -> dict:
        """The calibrator's report of one run of the shipped workflow."""
        form = model.removesuffix(CALIBRATED)
        outputs = self._run(learn(form, SEARCH, guard, name, self.files.get(model)))
        return json.loads(outputs["4"]["text"][0])

    def score(self, model: str, schedule: str | None, prefix: str) -> tuple[dict, list]:
        """Scores on the test prompts, and their pictures."""
        form = model.removesuffix(CALIBRATED)
        prompts, file = self.prompts.test, self.files.get(model)
        outputs = self._run(evaluate(form, schedule, prompts, TEST_SEED, f"demo/{prefix}", file))
        return json.loads(outputs["4"]["text"][0]), self._pictures(outputs["6"])

    def _pictures(self, output: dict) -> list[Image.Image]:
        found = [Image.open(io.BytesIO(self.server.image(entry))) for entry in output["images"]]
        return [picture.convert("RGB") for picture in found]

    def row(self, model: str, schedule: str | None = None, spent: Mapping | None = None) -> Row:
        """``spent`` are the figures of what the row took beside the row that it is compared with."""
        name = model + (SCHEDULED if schedule else "")
        content, pictures = self.score(model, schedule, name.replace(" + ", " ").replace(" ", "_"))
        info = content["provenance"]["model"]
        return Row(
            name,
            info["weight_bytes"],
            info["compute_dtype"],
            content["scores"],
            (spent or {}).get("nfe", 0),
            (spent or {}).get("seconds", 0.0),
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
        # it computes in fp32 anyway: its weights in fp16 would be converted for every prompt
        arguments += ("--fp32-text-enc",)
        arguments += vae_arguments(torch.cpu.get_capabilities())
    # glibc gives big blocks back to the system at once; faulting them in again takes long
    return arguments, {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def run(demo: Demo, say) -> tuple[list[Row], dict]:
    """All rows of the table, and the rest of the report."""
    say("the control: the same search on the unquantized model")
    control = demo.learn(UNQUANTIZED, guard=False, name="demo-control")
    full = demo.row(UNQUANTIZED)
    rows, details = [full], {"control": control, "weights": {}, "schedules": {}, "controls": {}}
    for weight_format in FORMATS:
        plain = demo.row(weight_format)
        rows.append(plain)
        models = [plain]
        say(f"{weight_format}: calibrating weights")
        found = demo.calibrate(weight_format)
        details["weights"][weight_format] = found
        say(f"{weight_format}: {found['report'].splitlines()[0]}")
        spent = {"nfe": found["evaluations"], "seconds": found["seconds"]}
        better = demo.row(weight_format + CALIBRATED, None, spent)
        better.compare(plain)
        models.append(better)
        for row in models if weight_format == LEARNED else []:
            say(f"{row.name}: learning a schedule")
            name = f"demo-{row.name.replace(' ', '-')}"
            report = demo.learn(row.name, guard=True, name=name)
            details["schedules"][row.name] = report
            say(f"{row.name}: {report['text']}")
            with_schedule = demo.row(row.name, f"{name}.json", report)
            with_schedule.compare(row)
            rows.append(with_schedule)
        rows.append(better)
    rows.sort(key=lambda row: (row is not full, row.name.startswith("nf4"), CALIBRATED in row.name,
                               SCHEDULED in row.name))  # fmt: skip
    for row in rows:
        row.distance = distance(row.pictures, full.pictures)
    say("scoring the control")
    controlled, _ = demo.score(UNQUANTIZED, "demo-control.json", "control")
    here = "searched on the unquantized model, scored on it"
    controls = {here: paired_interval(full.test["jaq"], controlled["scores"]["jaq"])}
    by_name = {row.name: row for row in rows}
    for model in (LEARNED, LEARNED + CALIBRATED):
        name = f"demo-{model.replace(' ', '-')}.json"
        learned, _ = demo.score(UNQUANTIZED, name, f"{model.replace(' ', '_')}_on_unquantized")
        what = f"searched on {model}, scored on the unquantized model"
        controls[what] = paired_interval(full.test["jaq"], learned["scores"]["jaq"])
        beyond = _difference_of_gains(
            (full.test["jaq"], learned["scores"]["jaq"]),
            (by_name[model].test["jaq"], by_name[model + SCHEDULED].test["jaq"]),
        )
        controls[f"gain of {model}{SCHEDULED} beyond that"] = beyond
    details["controls"] = {what: interval.to_dict() for what, interval in controls.items()}
    return rows, details


def _difference_of_gains(control: tuple, own: tuple):
    """The interval of the second gain minus the first, prompt by prompt."""
    gains = [[b - a for a, b in zip(*pair, strict=True)] for pair in (control, own)]
    return paired_interval(*gains)


def table(rows: list[Row], details: dict) -> str:
    head = (
        f"{'':26}{'weights':>10}{'JAQ on test [95 % interval]':>30}{'distance':>10}"
        f"{'gain [95 % interval], over':>44}{'NFE':>9}{'seconds':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        i = row.interval()
        gain = ""
        if row.gain is not None:
            gain = f"{_interval(row.gain)}, {row.over}"
        lines.append(
            f"{row.name:26}{row.weight_bytes / 1e6:>7.1f} MB"
            f"{f'{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]':>30}{row.distance:>10.1f}{gain:>44}"
            f"{row.nfe or '':>9}{f'{row.seconds:.0f}' if row.seconds else '':>9}"
        )
    lines += ["", f"control, on the {len(rows[0].test['jaq'])} test prompts:"]
    lines += [f"  {what}: {_interval(gain)}" for what, gain in details["controls"].items()]
    return "\n".join(lines)


def _interval(gain: Mapping) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def precisions(rows: list[Row], arguments: Sequence[str]) -> str:
    """What the models computed in, as they say themselves, and the VAE."""
    models = ", ".join(
        f"{row.name} {row.computes_in}" for row in rows if not row.name.endswith(SCHEDULED)
    )
    vae = "bfloat16" if "--bf16-vae" in arguments else "as ComfyUI chooses (float32 on a CPU)"
    return f"computed in: {models}; VAE {vae}"


def contact_sheet(rows: list[Row], prompts: tuple[str, ...]) -> bytes:
    """PNG: a row of pictures a model, the same prompts and seeds in every row."""
    label, caption = 180, 66
    sheet = Canvas(label + SHOWN * CELL, paper="white")
    for column, prompt in enumerate(prompts[:SHOWN]):
        sheet.paragraph(label + column * CELL + 4, 4, prompt, CELL - 8, "black", 12, 15, most=4)
    for index, row in enumerate(rows):
        top = caption + index * CELL
        lines = (row.name, f"{row.weight_bytes / 1e6:.1f} MB", f"JAQ {row.interval().mean:.3f}")
        y = top + 30
        for text in lines:
            y = sheet.paragraph(8, y, text, label - 16, "black", 15, 22, most=2)
        for column, picture in enumerate(row.pictures[:SHOWN]):
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
    for weight_format, found in details["weights"].items():
        picture = io.BytesIO()
        found.pop("picture").save(picture, "PNG")
        write_atomic(args.out / f"weights-{weight_format}.png", picture.getvalue())
    write_atomic(args.out / "report.json", json.dumps(report, indent=1))
    write_atomic(args.out / "contact_sheet.png", contact_sheet(rows, demo.prompts.test))
    for model, found in details["schedules"].items():
        name = f"schedule-{model.replace(' ', '-')}.json"
        write_atomic(args.out / name, found["schedule"])
    print(
        f"\n{table(rows, details)}\n\n{precisions(rows, arguments)}\n{seconds:.0f} s in all; files are in {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
