"""From an unquantized task to calibrated weights, and the proof that they are worth it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..files import check_folder
from ..formats import get
from ..formats.policy import Choice, Policy
from ..prompts import CalibrationPrompts, PromptSet
from ..source import Measure
from ..study import fingerprint
from ..task import Task
from .errors import RoundingError
from .file import RoundedWeights, Shelf
from .layer import Calibrated, RoundingSettings, plain
from .proof import Arm, Proof, distances, final_latents, jaq
from .states import TaskStates
from .walk import BlockDone, calibrate_module, choices, quantized

ALGORITHM = 1  # of the rounding: a walk of another one is not gone on with


@dataclass(frozen=True)
class WeightsResult:
    """Rounded weights, and how they compare: ``calibrated`` is False where plain ones were kept."""

    weights: RoundedWeights
    proof: Proof
    calibrated: bool
    seconds: float  # of the walk
    evaluations: int  # latents through the unquantized model to find the states

    @property
    def bits(self) -> float:
        """Bits a weight of the quantized layers, as stored."""
        packed = [layer.packed for layer in self.weights.layers.values()]
        return sum(8 * p.nbytes for p in packed) / sum(p.matrix[0] * p.matrix[1] for p in packed)


def calibrate_weights(
    task: Task,
    prompts: CalibrationPrompts,
    policy: Policy,
    folder: Path,
    *,
    settings: RoundingSettings | None = None,
    states_per_prompt: int = 0,
    seed: int = 0,
    measure: Measure | None = None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> WeightsResult:
    """Round the task's weights for the inputs that the calibration prompts give them.

    ``task`` is of the unquantized model and has its ``module``, which is left as it is.  Finished
    blocks are kept in ``folder``: a walk that was stopped goes on there, to the same weights.  On the
    held-out prompts the result is compared with plain rounding; where it is not nearer to the
    unquantized model, plain rounding is what is returned.  RoundingError, FormatError or DiskError
    before any work, or naming the layer that can't be rounded.
    """
    settings = settings or RoundingSettings()
    model = module_of(task)
    chosen = choices(model, policy)
    check_folder(folder, packed_bytes(model, chosen))
    made_of = {
        "algorithm": ALGORITHM,
        "settings": settings.to_dict(),
        "format": policy.format,
        "layers": {name: [c.format, c.weight_only] for name, c in chosen.items()},
        "task": dict(task.provenance),
        "sampling": task.trajectory.describe() | {"width": task.width, "height": task.height},
        "prompts": prompts.calibration.hash,
        "states_per_prompt": states_per_prompt,
        "seed": seed,
        "weights": digest(model),
    }
    began = time.monotonic()
    states = TaskStates(task, prompts.calibration, states_per_prompt, seed)
    # The batch is a matter of the order of sums, so it is part of what a walk depends on.
    shelf = Shelf(folder, fingerprint(made_of | {"batch": states.batch}), chosen)
    found = calibrate_module(model, states, policy, settings, shelf, on_block)
    seconds = time.monotonic() - began
    plainly = rounded_plainly(model, chosen)
    models = [nullcontext(), *(quantized(model, layers, chosen) for layers in (plainly, found))]
    proof = _proof(task, prompts.heldout, measure, models)
    kept = found if proof.holds else plainly
    provenance = made_of | {
        "states": len(states),
        "evaluations": states.evaluations,
        "heldout": prompts.heldout.hash,
        "proof": proof.to_dict(),
        "calibrated": proof.holds,
    }
    weights = RoundedWeights(kept, chosen, provenance)
    return WeightsResult(weights, proof, proof.holds, seconds, states.evaluations)


def module_of(task: Task) -> nn.Module:
    """The task's unquantized module; RoundingError if it has none, or one that is quantized."""
    if task.module is None:
        raise RoundingError(
            "the task has no module; give Task(..., module=...) the torch module that denoise runs"
        )
    for name, layer in task.module.named_modules():
        if hasattr(layer, "packed"):
            raise RoundingError(
                f"layer {name} is quantized already; give the task of the unquantized model"
            )
    return task.module


def _proof(
    task: Task,
    prompts: PromptSet,
    measure: Measure | None,
    models: Sequence[AbstractContextManager],
) -> Proof:
    """The unquantized, the plainly rounded and the calibrated model, each inside its context."""
    reference, arms, scores = None, [], None
    for model in models:
        with model:
            latents = final_latents(task, prompts)
        scored = None if measure is None else jaq(task, latents, prompts, measure)
        if reference is None:
            reference, scores = latents, scored
        else:
            arms.append(Arm(distances(latents, reference), scored))
    return Proof(*arms, scores)


def rounded_plainly(model: nn.Module, chosen: Mapping[str, Choice]) -> dict[str, Calibrated]:
    """The formats' own rounding of every chosen layer."""
    made = {}
    for name, choice in chosen.items():
        layer = model.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.detach()
        made[name] = plain(
            get(choice.format), layer.weight.detach(), bias, "plain rounding was kept"
        )
    return made


def packed_bytes(model: nn.Module, chosen: Mapping[str, Choice]) -> int:
    """What the rounded layers take on the disk, about."""
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in chosen}
    return sum(get(choice.format).packed_bytes(shapes[name]) for name, choice in chosen.items())


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) of every tensor of the model, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def report(result: WeightsResult) -> str:
    """The result in some lines of text."""
    proof, change = result.proof, result.proof.change
    lines = [
        f"{result.bits:.3f} bits a weight, rounded in {result.seconds:.0f} s",
        f"distance to the unquantized latents: plain {proof.plain.mean:.5f}, calibrated "
        f"{proof.calibrated.mean:.5f}",
        f"change {change.mean:+.5f} [{change.low:+.5f}, {change.high:+.5f}] on {change.n} prompts",
    ]
    if proof.gain is not None:
        lines.append(f"JAQ gain over plain rounding {proof.gain}")
    layers = result.weights.layers
    if result.calibrated:
        notes = {name: layer.note for name, layer in layers.items() if layer.note}
        lines.append(f"{len(layers) - len(notes)} of {len(layers)} layers calibrated")
        lines += [f"  {name}: rounded plainly, {note}" for name, note in notes.items()]
    else:
        lines.append("the held-out distance does not fall: plain rounding was kept")
    return "\n".join(lines)
