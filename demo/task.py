"""The demo model in plain torch, for the commands that need no graph.

    python -m qsched_core.calibrate --task demo.task:int2 \\
        --scorer demo/weights/scorer.safetensors --prompts prompts.json --out schedule.json
    python -m qsched_core.evaluate --task demo.task:int2 --reference-task demo.task:full \\
        --scorer demo/weights/scorer.safetensors --prompts prompts.json --schedule schedule.json

    python -m qsched_core.calibrate_weights --task demo.task:full --format int2 \\
        --prompts prompts.json --out weights.safetensors
    python -m qsched_core.evaluate --task demo.task:calibrated --reference-task demo.task:full \\
        --scorer demo/weights/scorer.safetensors --prompts prompts.json

``python -m demo.task prompts.json`` writes prompts that the model can draw.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from qsched_core.formats.module import quantize_module
from qsched_core.formats.policy import Policy
from qsched_core.rounding import RoundedWeights
from qsched_core.task import Task

from .build import weights_dir
from .mmdit import MMDiT
from .prompts import demo_prompts
from .taesd import LATENT_CHANNELS, TAESD
from .text import context_of, tokenize
from .training import load_weights

SIZE, LATENT = 96, 12
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # four steps of ComfyUI's scheduler "simple" at shift 3
UNQUANTIZED = "none"
WEIGHTS = (
    "QSCHED_WEIGHTS"  # names the file that ``calibrated`` loads; weights.safetensors without it
)


def make(
    weight_format: str,
    device: torch.device,
    sigmas: Sequence[float] = SIGMAS,
    rounded: RoundedWeights | None = None,
) -> Task:
    """The demo model with its weights in ``weight_format`` ("none": as shipped), or ``rounded``."""
    files = [weights_dir() / f"{name}.safetensors" for name in ("mmdit", "vae")]
    model = load_weights(MMDiT(), files[0])
    vae = load_weights(TAESD(), files[1])
    if rounded is not None:
        rounded.apply(model)
    elif weight_format != UNQUANTIZED:
        quantize_module(model, Policy(weight_format))
    model.to(device).eval()
    vae.to(device).eval()

    def denoise(x, sigma, context):
        return x - sigma.view(-1, 1, 1, 1) * model(x, sigma, context)

    def initial(seeds):
        shape = (1, LATENT_CHANNELS, LATENT, LATENT)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.cat(draws).to(device)

    return Task(
        denoise,
        initial,
        lambda prompts: {"context": context_of(tokenize(prompts)).to(device)},
        lambda latents: vae.decode(latents).movedim(1, -1),
        sigmas,
        SIZE,
        SIZE,
        {
            "model": "the demo model",
            "source_hash": ",".join(
                hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in files
            ),
            "patches": "",
            "format": weight_format,
            "device": device.type,
        }
        | ({} if rounded is None else {"rounding": rounded.digest}),
        module=model,
    )


def calibrated(device: torch.device) -> Task:
    """The demo model with the weights of qsched_core.calibrate_weights, see ``WEIGHTS``."""
    weights = RoundedWeights.load(os.environ.get(WEIGHTS, "weights.safetensors"))
    return make(weights.provenance["format"], device, rounded=weights)


full = partial(make, UNQUANTIZED)
int2 = partial(make, "int2")
int3 = partial(make, "int3")
nf4 = partial(make, "nf4")


def main() -> None:
    """Write the demo's calibration and held-out prompts as JSON to the path that is given."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo.task prompts.json")
    prompts = demo_prompts()
    content = {"calibration": prompts.calibration, "heldout": prompts.heldout}
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
