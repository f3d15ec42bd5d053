"""How int3 and int2 find a group's scale and zero point: four ways, by what the pictures score.

All ways fill the same tables, so they take the same bits.  A way is chosen by the JAQ of the demo's
held-out prompts; its score on the test prompts, which chose nothing, is the unbiased one.  Rows:
``jaq`` and ``jaq_test`` are mean scores (the difference to the format's own rounding in
``gain``, with its paired interval), ``weight`` and ``velocity`` relative errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from demo.build import weights_dir
from demo.mmdit import MMDiT
from demo.prompts import demo_prompts
from demo.taesd import TAESD
from demo.text import context_of, tokenize
from demo.training import load_weights
from qsched_core.files import write_atomic
from qsched_core.formats import get
from qsched_core.formats.affine import GroupAffine
from qsched_core.formats.base import Error
from qsched_core.formats.policy import Policy
from qsched_core.objective import Objective
from qsched_core.prompts import CalibrationPrompts, PromptSet
from qsched_core.scorers.open_clip import load_file
from qsched_core.solvers import sample_euler
from qsched_core.statistics import Interval, paired_interval

from ._common import machine

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])  # the demo's: "simple", 4 steps, shift 3
LATENT = (16, 12, 12)
BATCH = 32
Table = tuple[torch.Tensor, torch.Tensor]  # scale and zero point, [rows, groups, 1]


def absmax(values: torch.Tensor, top: int) -> Table:
    """Symmetric: the largest magnitude is the last code above the middle one, which is 0."""
    middle = (top + 1) // 2
    scale = values.abs().amax(2, keepdim=True) / (top - middle)
    return scale.clamp(min=1e-30), torch.full_like(scale, middle)


def min_max(values: torch.Tensor, top: int) -> Table:
    """The smallest and the largest value are the first and the last code."""
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    scale = ((high - low) / top).clamp(min=1e-30)
    return scale, -low / scale


def half_quadratic(values: torch.Tensor, top: int) -> Table:
    """HQQ (Badri and Shaji 2023): from min and max, the zero point with the least |error|^0.7.

    Its alternating half-quadratic solver with the published settings; the scale stays.
    """
    scale, zero = min_max(values, top)
    exponent, beta, best = 0.7, 10.0, torch.inf
    for _ in range(20):
        codes = (values / scale + zero).round().clamp(0, top)
        left = values - (codes - zero) * scale
        error = float(left.abs().mean())
        if error >= best:
            break
        best = error
        shrunk = left.abs() - left.abs().clamp(min=1e-12) ** (exponent - 1) / beta
        left = left.sign() * shrunk.clamp(min=0)
        zero = (codes - (values - left) / scale).mean(2, keepdim=True)
        beta *= 1.01
    return scale, zero


ROUNDINGS: dict[str, Callable[[torch.Tensor, int], Table] | None] = {
    "least_squares": None,  # the format's own
    "absmax": absmax,
    "min_max": min_max,
    "half_quadratic": half_quadratic,
}


def variant(form: GroupAffine, rounding: Callable[[torch.Tensor, int], Table] | None):
    """The format with another way to find scale and zero."""
    if rounding is None:
        return form

    class Variant(type(form)):
        def fit(self, values, common):
            return self.store(*rounding(values, self.top), common)

    return Variant()


def quantized(form: GroupAffine) -> tuple[MMDiT, float]:
    """The demo's generator on weights that ``form`` rounded, and their relative error.

    Layers are those of the default policy, which gives modulation 4 bits; its error is not counted.
    """
    model, policy, error = generator(), Policy(form.name), Error()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
        choice = policy(name, tuple(layer.weight.shape), kind)
        if choice.format is None:
            continue
        chosen = form if choice.format == form.name else get(choice.format)
        rounded = chosen.dequantize(chosen.quantize(layer.weight.detach()))
        if chosen is form:
            error.add(rounded, layer.weight.detach())
        layer.weight.data = rounded
    return model, error.relative()


def generator() -> MMDiT:
    return load_weights(MMDiT(), weights_dir() / "mmdit.safetensors").eval()


class Study:
    """Samples and scores models on prompts; every model starts from the same noise."""

    def __init__(self, seeds: int):
        self.seeds = seeds
        self.vae = load_weights(TAESD(), weights_dir() / "vae.safetensors").eval()
        self.objective = Objective(load_file(weights_dir() / "scorer.safetensors"))

    def starts(self, prompts: PromptSet):
        """(prompts, noise, context) in batches, ``seeds`` starts a prompt."""
        for start in range(0, len(prompts), BATCH):
            part = prompts.part(start, start + BATCH)
            context = context_of(tokenize(part.prompts))
            for extra in range(self.seeds):
                noise = [
                    torch.randn(LATENT, generator=torch.Generator().manual_seed(seed + extra))
                    for seed in part.seeds
                ]
                yield part, torch.stack(noise), context

    @torch.no_grad()
    def score(self, model: MMDiT, prompts: PromptSet) -> list[float]:
        """JAQ of each prompt, the mean over its starts."""
        scores: dict[str, float] = dict.fromkeys(prompts.prompts, 0.0)
        for part, noise, context in self.starts(prompts):
            latents = sample_euler(_denoiser(model, context), noise, SIGMAS)
            images = self.vae.decode(latents).clamp(0, 1).movedim(1, -1)
            for prompt, jaq in zip(
                part.prompts, self.objective.score(images, part.prompts).jaq, strict=True
            ):
                scores[prompt] += jaq / self.seeds
        return list(scores.values())

    @torch.no_grad()
    def velocity_error(self, model: MMDiT, exact: MMDiT, prompts: PromptSet) -> float:
        """Relative error of the velocity at the points that the exact model passes."""
        error = Error()
        for _, noise, context in self.starts(prompts):
            exactly = _denoiser(exact, context)

            def both(x, sigma, context=context, exactly=exactly):
                denoised = exactly(x, sigma)
                velocity = (x - denoised) / sigma.reshape(-1, 1, 1, 1)
                error.add(model(x, sigma, context), velocity)
                return denoised

            sample_euler(both, noise, SIGMAS)
        return error.relative()


def _denoiser(model: MMDiT, context: torch.Tensor):
    return lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * model(x, sigma, context)


@dataclass(frozen=True)
class Row:
    id: str
    weight: float
    velocity: float
    jaq: float
    gain: Interval
    jaq_test: float
    gain_test: Interval
    seeds: int
    machine: str


def study(seeds: int) -> list[Row]:
    prompts = demo_prompts()
    heldout = CalibrationPrompts.of(prompts.calibration, prompts.heldout).heldout
    test = CalibrationPrompts.of(prompts.calibration, prompts.test, seed=1).heldout
    judge, exact, rows = Study(seeds), generator(), []
    unquantized = [judge.score(exact, part) for part in (heldout, test)]
    for name in ("int3", "int2"):
        own: list[list[float]] = []
        for rounding, function in ROUNDINGS.items():
            model, weight = quantized(variant(get(name), function))
            scores = [judge.score(model, part) for part in (heldout, test)]
            own = own or scores
            gains = [paired_interval(a, b) for a, b in zip(own, scores, strict=True)]
            velocity = judge.velocity_error(model, exact, heldout)
            rows.append(_row(f"rounding.{name}.{rounding}", weight, velocity, scores, gains, seeds))
        gains = [paired_interval(a, b) for a, b in zip(own, unquantized, strict=True)]
        rows.append(_row(f"rounding.{name}.unquantized", 0.0, 0.0, unquantized, gains, seeds))
    return rows


def _row(name, weight, velocity, scores, gains, seeds) -> Row:
    heldout, test = (sum(part) / len(part) for part in scores)
    row = Row(name, weight, velocity, heldout, gains[0], test, gains[1], seeds, machine())
    print(
        f"{row.id:32} weight {weight:.4f}, velocity {velocity:.4f}, held-out JAQ {heldout:.4f} "
        f"({row.gain}), test {test:.4f} ({row.gain_test})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt")
    args = parser.parse_args()
    rows = study(args.seeds)
    if args.json is not None:
        write_atomic(args.json, json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
