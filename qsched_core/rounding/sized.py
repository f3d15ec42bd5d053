"""Calibrated weights of a given size: formats by layer, and whether the mix is worth it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..files import check_folder, write_atomic
from ..formats.policy import Choice, Policy
from ..prompts import CalibrationPrompts
from ..study import fingerprint
from .budget import Allocation, Budget, LayerCost, allocate, uniform
from .layer import RoundingSettings
from .run import OnPart, WeightsResult, calibrate_weights
from .subject import Subject
from .sweep import Sweep
from .walk import Limits, choices

logger = logging.getLogger(__name__)

ALGORITHM = 1  # of the costs: those of another one are not gone on with
WEIGHING = "weighing layers"  # a part of the work, for ``on_part``


@dataclass(frozen=True)
class Point:
    """Calibrated weights in one format, or "mixed": bits a weight, and the held-out distance."""

    format: str
    bits: float
    distance: float


@dataclass(frozen=True)
class SizedResult:
    """What is kept (``result``), how formats were chosen, and how they compare.

    ``mixed`` is the mix, ``uniform`` the formats next to it in size; none if that was not asked for.
    """

    result: WeightsResult
    allocation: Allocation
    budget: Budget
    evaluations: int  # of the model, to choose
    seconds: float  # likewise
    mixed: Point
    uniform: tuple[Point, ...] = ()

    @property
    def line(self) -> float | None:
        """The distance at the mix's bits on the straight line through the uniform formats.

        In the logarithm of the distance; with one of them, its distance.
        """
        return log_line(self.uniform, self.mixed.bits)

    @property
    def holds(self) -> bool:
        """Whether the mix is what is kept."""
        return self.line is None or self.mixed.distance < self.line


def log_line(points: tuple[Point, ...], bits: float) -> float | None:
    """The distance at ``bits`` on the line through one or two points, log distance over bits."""
    if not points:
        return None
    if len(points) == 1 or points[0].bits == points[1].bits:
        return points[0].distance
    low, high = points
    share = (bits - low.bits) / (high.bits - low.bits)
    ends = [math.log(max(point.distance, 1e-30)) for point in (low, high)]
    return math.exp(ends[0] + share * (ends[1] - ends[0]))


def calibrate_to_size(
    subject: Subject,
    prompts: CalibrationPrompts,
    policy: Policy,
    folder: Path,
    budget: Budget,
    *,
    settings: RoundingSettings | None = None,
    states_per_prompt: int = 0,
    seed: int = 0,
    compare: bool = True,
    on_part: OnPart = lambda part, done, total: None,
    limits: Limits | None = None,
    **more: Any,
) -> SizedResult:
    """As :func:`.run.calibrate_weights`, with formats by layer so that the model fits ``budget``.

    ``policy`` says which layers are quantized; those that its overrides name a format for keep it.
    Each other layer is rounded alone in every format of the ladder and its cost measured on the
    first prompts; then the walk runs with the cheapest formats that fit.  With ``compare`` the
    uniform formats next to the mix in size are calibrated as well, and the mix is kept only if it is
    nearer to the unquantized model, on the held-out prompts, than the straight line between them (in
    log distance over bits); else the smaller of them is.  Costs are kept in ``folder`` block by
    block.  RoundingError, before the walk, for a budget that can't be met.
    """
    settings, limits = settings or RoundingSettings(), limits or Limits()
    model = subject.module
    base = replace(policy, format=budget.ladder[0])
    chosen = choices(model, base)
    fixed = [name for name in chosen if _is_fixed(policy, name)]
    shared = {
        "settings": settings,
        "states_per_prompt": states_per_prompt,
        "seed": seed,
        "on_part": on_part,
        "limits": limits,
        **more,
    }
    costs, evaluations, seconds = _costs(
        subject, prompts, chosen, fixed, folder, budget, settings, states_per_prompt, seed, on_part,
        limits,
    )  # fmt: skip
    mix = allocate(costs, budget.room(costs, rest_bytes(model, chosen)))

    def made(allocation: Allocation, name: str, **proof_of: Any) -> tuple[WeightsResult, Point]:
        formats = allocation.formats
        here = {n: replace(choice, format=formats[n]) for n, choice in chosen.items()}
        result = calibrate_weights(subject, prompts, here, folder, **shared | proof_of)
        proof = result.proof
        distance = (proof.calibrated if proof.holds else proof.plain).mean
        return result, Point(name, allocation.bits, distance)

    kept, mixed = made(mix, "mixed")
    # Without pictures and scores: only what is kept needs those.
    points = tuple(
        made(uniform(costs, form), form, measure=None, samples=False)[1]
        for form in (_next_to(mix, budget, costs) if compare else ())
    )
    found = SizedResult(kept, mix, budget, evaluations, seconds, mixed, points)
    if not found.holds:  # the smallest of the ladder is never larger than the mix
        smaller = points[0].format
        found = replace(found, result=made(uniform(costs, smaller), smaller)[0])
    return found


def _next_to(mix: Allocation, budget: Budget, costs) -> list[str]:
    """The uniform formats next to the mix in size: the one below and the one above, if there are."""
    bits = {form: uniform(costs, form).bits for form in budget.ladder}
    below = [form for form in budget.ladder if bits[form] <= mix.bits]
    above = [form for form in budget.ladder if bits[form] > mix.bits]
    found = [max(below, key=bits.__getitem__)] if below else []
    return found + ([min(above, key=bits.__getitem__)] if above else [])


def _is_fixed(policy: Policy, name: str) -> bool:
    """Whether the user names a format for the layer."""
    given = [override for override in policy.overrides if override.matches(name, "linear")]
    return bool(given) and given[-1].format is not None


def rest_bytes(model: nn.Module, chosen: Mapping[str, Choice]) -> int:
    """What of the model is not weights of ``chosen`` layers."""
    weights = {f"{name}.weight" for name in chosen}
    state = model.state_dict().items()
    return sum(t.numel() * t.element_size() for name, t in state if name not in weights)


def _costs(
    subject, prompts, chosen, fixed, folder, budget, settings, per_prompt, seed, on_part, limits
) -> tuple[list[LayerCost], int, float]:
    """Costs of all layers, evaluations and seconds: measured, or as they were kept."""
    few = prompts.calibration.part(0, budget.prompts)
    made_of = {
        "algorithm": ALGORITHM,
        "settings": settings.to_dict(),
        "ladder": list(budget.ladder),
        "layers": {n: [c.format if n in fixed else "", c.weight_only] for n, c in chosen.items()},
        **subject.describe(),
        "prompts": few.hash,
        "states_per_prompt": per_prompt,
        "seed": seed,
    }
    path = folder / f"costs-{fingerprint(made_of)[:32]}.json"
    known, spent, before = _read(path)
    if set(known) == set(chosen):
        return [known[name] for name in chosen], round(spent), before
    check_folder(folder, 0)
    began = time.monotonic()
    on_part(WEIGHING, len(known), len(chosen))
    states = subject.states(few, per_prompt, seed)
    sweep = Sweep(
        subject.module, states, chosen, fixed, budget.ladder, settings, subject.parameters_of,
        replace(limits, scratch=limits.scratch or folder),
    )  # fmt: skip
    limits.tell(
        f"weighing {len(sweep.measured)} layers takes about {sweep.predicted(known):.0f} model "
        f"evaluations of one latent ({len(states)} states)"
    )

    def seconds() -> float:
        return before + time.monotonic() - began

    def keep(found: Mapping[str, LayerCost]) -> None:
        _write(path, found, spent + sweep.evaluations, seconds())

    found = sweep.run(known, lambda done, total: on_part(WEIGHING, done, total), keep)
    keep(found)
    return list(found.values()), round(spent + sweep.evaluations), seconds()


def _read(path: Path) -> tuple[dict[str, LayerCost], float, float]:
    """Costs by layer, evaluations and seconds; none where there is no file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        costs = [LayerCost.of(cost) for cost in content["costs"]]
        return {c.name: c for c in costs}, float(content["evaluations"]), float(content["seconds"])
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        logger.warning("layers are weighed again: %s is damaged (%s)", path.name, error)
    return {}, 0.0, 0.0


def _write(path: Path, costs: Mapping[str, LayerCost], evaluations: float, seconds: float) -> None:
    content = {
        "costs": [cost.to_dict() for cost in costs.values()],
        "evaluations": evaluations,
        "seconds": round(seconds, 1),
    }
    write_atomic(path, json.dumps(content))


def sized_figures(found: SizedResult) -> dict[str, Any]:
    """The choice and how it compares, as plain JSON."""
    return {
        "budget": str(found.budget),
        "bits": found.allocation.bits,
        "evaluations": found.evaluations,
        "seconds": found.seconds,
        "predicted_error": found.allocation.error,
        "mixed": vars(found.mixed),
        "uniform": [vars(point) for point in found.uniform],
        "line": found.line,
        "kept": "mixed" if found.holds else found.uniform[0].format,
        "layers": found.allocation.rows(),
    }


def sized_report(found: SizedResult) -> str:
    """The choice in some lines of text."""
    counts: dict[str, int] = {}
    for option in found.allocation.chosen:
        counts[option.format] = counts.get(option.format, 0) + 1
    layers = ", ".join(f"{count} {form}" for form, count in counts.items())
    lines = [
        f"{found.budget}: {layers} layers, {found.allocation.bits:.3f} bits a weight; chosen with "
        f"{found.evaluations} model evaluations in {found.seconds:.0f} s"
    ]
    if not found.uniform:
        return f"{lines[0]}; not compared with uniform formats"
    others = " and ".join(f"{p.format} ({p.bits:.2f} bits) {p.distance:.5f}" for p in found.uniform)
    lines.append(
        f"distance of the mix {found.mixed.distance:.5f}, of the line through {others} "
        f"{found.line:.5f}: {found.mixed.distance / found.line:.2f} of it"
    )
    if not found.holds:
        lines.append(f"the mix is no better than that line: {found.uniform[0].format} was kept")
    return "\n".join(lines)
