"""Our solvers against ComfyUI's samplers of the same name, on the demo's generator.

``step_time.<solver>`` is our wall time over ComfyUI's for a 4-step trajectory of 4 latents (the
median over neighbouring runs): 1.00 is as fast.  ``step_overhead_us`` and ``extra_memory`` take the
model away, so that only the sampling itself is seen.  Everything runs on one thread: passes this
short measure the thread pool otherwise, and a busy machine's neighbours.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from demo.build import weights_dir
from demo.mmdit import MMDiT
from demo.text import context_of, tokenize
from demo.training import load_weights
from qsched_core.correction import ScalarCorrection
from qsched_core.solvers import SOLVERS, ModelInfo, sample_euler

from ._common import BenchRow, machine, options, report, timings

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
STEPS = len(SIGMAS) - 1
CORRECTION = ScalarCorrection((0.97, 0.98, 1.01, 1.0), (1.03, 1.02, 1.0, 0.99))
LATENT = (1, 16, 128, 128)
NAMED_IN_CORE = {
    "ddim": "euler",
    "tcd": "lcm",
    "dpm_2m": "dpmpp_2m",
    "lms_2": "lms",
}  # what ComfyUI runs, or the nearest that it has


class Denoiser:
    """A model as a ComfyUI sampler sees it; ``predict(x, sigma)`` is the clean latent."""

    def __init__(self, predict, model_sampling):
        self.predict = predict
        patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)
        base = SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher)

    @torch.no_grad()
    def __call__(self, x, sigma, seed=None):
        return self.predict(x, sigma)


def demo_model(model_sampling) -> Denoiser:
    model = load_weights(MMDiT(), weights_dir() / "mmdit.safetensors").eval()
    context = context_of(tokenize(["a red circle above a blue ring on a white background"] * 4))
    return Denoiser(
        lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * model(x, sigma, context), model_sampling
    )


def step_times(theirs, model_sampling, runs: int) -> list[BenchRow]:
    denoiser = demo_model(model_sampling)
    info = ModelInfo(True, first_sigma=float(model_sampling.percent_to_sigma(1e-4)))
    x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, solver in SOLVERS.items():
        core_name = NAMED_IN_CORE.get(name, name)
        core = getattr(theirs, f"sample_{core_name}")
        arguments = solver.bind(info)

        def ours(solver=solver, arguments=arguments):
            return solver.function(
                denoiser, x, SIGMAS, {"seed": 1}, correction=CORRECTION, **arguments
            )

        def other(core=core):
            return core(denoiser, x, SIGMAS, {"seed": 1}, disable=True)

        ours_s, other_s = timings(ours, other, runs)
        rows.append(
            BenchRow(
                f"step_time.{name}",
                f"corrected {name} against ComfyUI's {core_name}, 4 steps of 4 latents",
                statistics.median(ours_s) / STEPS,
                statistics.median(other_s) / STEPS,
                statistics.median(a / b for a, b in zip(ours_s, other_s, strict=True)),
                "s/step",
                runs,
                machine(),
                "<= 1.02",
            )
        )
    return rows


def step_overhead(theirs, model_sampling, runs: int) -> BenchRow:
    """Our time a step beyond ComfyUI's euler, in units of the two multiply-adds' own time.

    The two: one fused pass each, a + c * b of whole latents into a new tensor.
    """
    generator = torch.Generator().manual_seed(0)
    x, denoised = (torch.randn(LATENT, generator=generator) for _ in range(2))
    denoiser = Denoiser(lambda x, sigma: denoised, model_sampling)
    # a call is short: each measurement is the mean of some, and the three are taken in turn
    calls = 5

    def ours():
        sample_euler(denoiser, x, SIGMAS, {"seed": 1}, correction=CORRECTION)

    def other():
        theirs.sample_euler(denoiser, x, SIGMAS, {"seed": 1}, disable=True)

    def multiply_adds():
        for _ in range(STEPS):
            scaled = torch.add(denoised, x, alpha=0.97)
            torch.add(scaled, denoised, alpha=-1.03)

    times: dict = {ours: [], other: [], multiply_adds: []}
    for _ in range(runs + 1):
        for call, taken in times.items():
            started = time.perf_counter()
            for _ in range(calls):
                call()
            taken.append((time.perf_counter() - started) / calls / STEPS * 1e6)
    # the first of each warms up; differences are of neighbours, so that drift cancels
    extra = statistics.median(a - b for a, b in zip(times[ours][1:], times[other][1:], strict=True))
    unit = statistics.median(times[multiply_adds][1:])
    return BenchRow(
        "step_overhead_us",
        "corrected euler beyond ComfyUI's euler, a model that returns at once, 1x16x128x128, "
        "against two multiply-adds",
        extra,
        unit,
        extra / unit,
        "us/step",
        runs,
        machine(),
        "<= 1.5",
    )


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside it that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _dense(t)}
        for tensor in tree_leaves(out):
            if _dense(tensor):
                self._track(tensor.untyped_storage(), given)
        return out

    def _track(self, storage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:  # a view, or written in place
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed():
            self._known.discard(key)
            self.live -= size

        # a storage keeps its Python object: the finalizer runs when the memory is given back
        weakref.finalize(storage, freed)


def _dense(value) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def extra_memory(theirs, model_sampling) -> BenchRow:
    """Peak of live latents beyond ComfyUI's sampler of the same name: the worst solver's."""
    info = ModelInfo(True, first_sigma=float(model_sampling.percent_to_sigma(1e-4)))
    denoiser = Denoiser(lambda x, sigma: x * 0.5, model_sampling)
    latent = torch.zeros(LATENT).untyped_storage().nbytes()

    def peak(function, **arguments) -> float:
        x = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
        with LiveStorage() as seen:
            function(denoiser, x, SIGMAS, {"seed": 1}, **arguments)
        return seen.peak / latent

    extra = {}
    for name, solver in SOLVERS.items():
        core = getattr(theirs, f"sample_{NAMED_IN_CORE.get(name, name)}")
        ours = peak(solver.function, correction=CORRECTION, **solver.bind(info))
        extra[name] = ours - peak(core, disable=True)
    worst = max(extra, key=extra.get)
    each = ", ".join(f"{name} {value:+.2f}" for name, value in extra.items())
    return BenchRow(
        "extra_memory",
        f"peak of live tensors beyond ComfyUI's sampler, of one latent; worst {worst} ({each})",
        extra[worst],
        1.0,
        extra[worst],
        "latents",
        1,
        machine(),
        "<= 1",
    )


def main() -> None:
    args = options(__doc__, groups=("step_time", "step_overhead", "extra_memory"))
    torch.set_num_threads(1)
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True
    theirs = importlib.import_module("comfy.k_diffusion.sampling")
    module = importlib.import_module("comfy.model_sampling")
    flow = type("ModelSampling", (module.ModelSamplingDiscreteFlow, module.CONST), {})()

    rows = []
    if "step_time" in args.only:
        rows += step_times(theirs, flow, args.runs)
    if "step_overhead" in args.only:
        rows.append(step_overhead(theirs, flow, args.runs))
    if "extra_memory" in args.only:
        rows.append(extra_memory(theirs, flow))
    report(rows, args.json)


if __name__ == "__main__":
    main()
