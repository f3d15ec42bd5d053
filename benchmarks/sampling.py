"""Our solvers against ComfyUI's samplers of the same name, on the demo's generator.

The ratio is our wall time over ComfyUI's for a 4-step trajectory of 4 latents: 1.00 is as fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace

import torch

from demo.build import weights_dir
from demo.mmdit import MMDiT
from demo.text import context_of, tokenize
from demo.training import load_weights
from qsched_core.precondition import ScalarCorrection
from qsched_core.solvers import SOLVERS

from ._common import BenchRow, machine, medians, options, report

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
CORRECTION = ScalarCorrection((0.97, 0.98, 1.01, 1.0), (1.03, 1.02, 1.0, 0.99))


class Denoiser:
    """The demo's generator as a ComfyUI sampler sees a model."""

    def __init__(self, model: MMDiT, context: torch.Tensor, model_sampling):
        self.model, self.context = model, context
        patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)
        base = SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher)

    @torch.no_grad()
    def __call__(self, x, sigma, seed=None):
        velocity = self.model(x, sigma, self.context)
        return x - sigma.reshape(-1, 1, 1, 1) * velocity


def main() -> None:
    args = options(__doc__)
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True
    theirs = importlib.import_module("comfy.k_diffusion.sampling")
    model_sampling = importlib.import_module("comfy.model_sampling").CONST()

    model = load_weights(MMDiT(), weights_dir() / "mmdit.safetensors").eval()
    context = context_of(tokenize(["a red circle above a blue ring on a white background"] * 4))
    denoiser = Denoiser(model, context, model_sampling)
    x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, solver in SOLVERS.items():
        core = getattr(theirs, f"sample_{name}")

        def ours(solver=solver):
            return solver.function(
                denoiser, x, SIGMAS, {"seed": 1}, correction=CORRECTION, **solver.options(True)
            )

        def other(core=core):
            return core(denoiser, x, SIGMAS, {"seed": 1}, disable=True)

        ours_s, other_s = medians(ours, other, args.runs)
        rows.append(
            BenchRow(
                f"step_time.{name}",
                f"corrected {name} against ComfyUI's own, 4 steps of 4 latents",
                ours_s / 4,
                other_s / 4,
                ours_s / other_s,
                "s/step",
                args.runs,
                machine(),
            )
        )
    report(rows, args.json)


if __name__ == "__main__":
    main()
