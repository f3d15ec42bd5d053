"""From an unquantized model to calibrated weights, and the proof that they are worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..files import check_folder
from ..formats import get
from ..formats.policy import Choice, Policy
from ..prompts import CalibrationPrompts, PromptSet
from ..source import Measure
from ..study import fingerprint
from ..text import markdown
from .file import RoundedWeights
from .layer import Calibrated, RoundingSettings, plain
from .proof import MODELS, Proof, Sample, prove
from .shelf import Shelf
from .subject import Subject
from .walk import BlockDone, Limits, ParametersOf, calibrate_module, choices

ALGORITHM = 3  # of the rounding: a walk of another one is not gone on with
MIXED = "mixed"  # of a walk whose formats are given by layer
KEPT_PLAIN = "plain rounding was kept"
SAMPLING, PROVING = "sampling the unquantized model", "comparing on held-out prompts"
OnPart = Callable[[str, float, int], None]


@dataclass(frozen=True)
class WeightsResult:
    """Rounded weights, and how they compare: ``calibrated`` is False where plain ones were kept.

    ``plain_bits``: bits a weight of plain rounding, which keeps modulation layers at 4 bits and more.
    ``samples`` are held-out prompts with their pictures.
    """

    weights: RoundedWeights
    proof: Proof
    plain_bits: float
    samples: tuple[Sample, ...] = ()

    @property
    def calibrated(self) -> bool:
        return self.proof.holds

    @property
    def seconds(self) -> float:
        """Of the walk, from its states on; of one that went on after a stop, since then."""
        return float(self.weights.provenance["seconds"])

    @property
    def evaluations(self) -> int:
        """Latents that went through the unquantized model to find the states."""
        return int(self.weights.provenance["evaluations"])

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know of the walk: too few prompts, batches that were too large."""
        return tuple(self.weights.provenance.get("remarks", ()))

    @property
    def bits(self) -> float:
        """Bits a weight of the quantized layers, as stored."""
        packed = [layer.packed for layer in self.weights.layers.values()]
        return sum(8 * p.nbytes for p in packed) / sum(p.matrix[0] * p.matrix[1] for p in packed)


def calibrate_weights(
    subject: Subject,
    prompts: CalibrationPrompts,
    policy: Policy | Mapping[str, Choice],
    folder: Path,
    *,
    settings: RoundingSettings | None = None,
    states_per_prompt: int = 0,
    seed: int = 0,
    measure: Measure | None = None,
    samples: bool = False,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    on_part: OnPart = lambda part, done, total: None,
    limits: Limits | None = None,
) -> WeightsResult:
    """Round the subject's weights for the inputs that the calibration prompts give them.

    ``policy`` may be the choices themselves, by layer.  Its module is left as it is.  Finished blocks are kept in ``folder``: a walk that was stopped
    goes on there, to the same weights, and one that is finished is not repeated.  On the held-out
    prompts the result is compared with plain rounding, by distance to the unquantized model and by
    ``measure``, if given; where it is not nearer, plain rounding is what is returned.  ``samples``
    asks for pictures.  ``on_part(part, done, total)`` tells of the parts before and after the blocks,
    from 0 on.
    The states are in ``folder`` too, unless ``limits`` names another; what these tell is kept with
    the weights.  RoundingError, FormatError or DiskError before any work, or naming the layer that
    can't be rounded.
    """
    settings = settings or RoundingSettings()
    model = subject.module
    chosen = plain_chosen = policy
    if isinstance(policy, Policy):
        chosen, plain_chosen = choices(model, policy), choices(model, policy, calibrated=False)
    chosen = dict(chosen)
    made_of = {
        "algorithm": ALGORITHM,
        "settings": settings.to_dict(),
        "format": policy.format if isinstance(policy, Policy) else MIXED,
        "layers": {name: [c.format, c.weight_only] for name, c in chosen.items()},
        **subject.describe(),
        "prompts": prompts.calibration.hash,
        "states_per_prompt": states_per_prompt,
        "seed": seed,
    }
    # The batch is a matter of the order of sums, so it is part of what a walk depends on.
    shelf = Shelf(folder, fingerprint(made_of | {"batch": subject.source.max_batch}), chosen)
    made = shelf.weights()
    if made is None:
        check_folder(folder, 2 * packed_bytes(model, chosen))
        shelf.begin()
        began = time.monotonic()
        on_part(SAMPLING, 0, len(prompts.calibration))
        states = subject.states(
            prompts.calibration, states_per_prompt, seed, partial(on_part, SAMPLING)
        )
        remarks: list[str] = []
        within = _within(folder, limits or Limits(), remarks)
        layers = calibrate_module(
            model, states, policy, settings, shelf, on_block, subject.parameters_of, within
        )
        cost = {
            "states": len(states),
            "evaluations": states.evaluations,
            "seconds": round(time.monotonic() - began, 1),
            "remarks": remarks,
        }
        made = RoundedWeights(layers, chosen, made_of | cost)
        shelf.keep(made)
    return _proven(subject, made, plain_chosen, prompts.heldout, shelf, measure, samples, on_part)


def _within(folder: Path, limits: Limits, remarks: list[str]) -> Limits:
    """``limits`` with their scratch in ``folder`` if it has no place, and what they tell noted."""

    def tell(line: str) -> None:
        remarks.append(line)
        limits.tell(line)

    return replace(limits, scratch=limits.scratch or folder, tell=tell)


def _proven(
    subject: Subject,
    made: RoundedWeights,
    plain_chosen: Mapping[str, Choice],
    heldout: PromptSet,
    shelf: Shelf,
    measure: Measure | None,
    samples: bool,
    on_part: OnPart,
) -> WeightsResult:
    """The weights, or plain ones, with the proof of which are better."""
    judged_by = {
        "heldout": heldout.hash,
        "measure": None if measure is None else measure.describe(),
        "samples": samples,
    }
    found, plainly = shelf.proof(judged_by), None
    if found is None:
        on_part(PROVING, 0, MODELS * len(heldout))
    if found is None or not found[0].holds:
        plainly = RoundedWeights(
            rounded_plainly(plain_chosen, subject.parameters_of), plain_chosen, made.provenance
        )
    if found is None:
        told = partial(on_part, PROVING)
        found = prove(subject, heldout, [plainly, made], measure, samples, told)
        shelf.keep_proof(judged_by, *found)
    proof, pictures = found
    told = {"heldout": heldout.hash, "proof": proof.to_dict(), "calibrated": proof.holds}
    kept = made if proof.holds else plainly
    weights = RoundedWeights(kept.layers, kept.chosen, dict(made.provenance) | told)
    plain_bits = _bits(subject.module, plain_chosen)
    return WeightsResult(weights, proof, plain_bits, proof.samples(heldout, pictures))


def rounded_plainly(
    chosen: Mapping[str, Choice], parameters_of: ParametersOf, note: str = KEPT_PLAIN
) -> dict[str, Calibrated]:
    """The formats' own rounding of every chosen layer, on the CPU."""
    return {
        name: plain(get(choice.format), *parameters_of(name), note).to("cpu")
        for name, choice in chosen.items()
    }


def packed_bytes(model: nn.Module, chosen: Mapping[str, Choice]) -> int:
    """What the rounded layers take on the disk, about."""
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in chosen}
    return sum(get(choice.format).packed_bytes(shapes[name]) for name, choice in chosen.items())


def _bits(model: nn.Module, chosen: Mapping[str, Choice]) -> float:
    """Bits a weight of the quantized layers."""
    weights = sum(model.get_submodule(name).weight.numel() for name in chosen)
    return 8 * packed_bytes(model, chosen) / weights


def figures(result: WeightsResult) -> dict[str, Any]:
    """Provenance and every figure, as plain JSON."""
    return dict(result.weights.provenance) | {
        "seconds": result.seconds,
        "bits": result.bits,
        "plain_bits": result.plain_bits,
    }


def verdict(result: WeightsResult) -> str:
    """What became of it, in a sentence."""
    proof, change = result.proof, result.proof.change
    share = proof.calibrated.mean / proof.plain.mean if proof.plain.mean else 1.0
    if result.calibrated:
        bits, plainly = f"{result.bits:.2f}", f"{result.plain_bits:.2f}"
        instead = "" if bits == plainly else f" instead of {plainly}"
        return (
            f"calibrated: {share:.2f} of plain rounding's distance to the unquantized model, at "
            f"{bits} bits a weight{instead}, on {change.n} prompts that it never saw"
        )
    return (
        f"the distance to the unquantized model does not fall on {change.n} held-out prompts "
        f"({change.mean:+.5f} [{change.low:+.5f}, {change.high:+.5f}]): {KEPT_PLAIN}"
    )


def report(result: WeightsResult) -> str:
    """The result in some lines of text."""
    proof, change = result.proof, result.proof.change
    lines = [
        verdict(result),
        f"{result.bits:.3f} bits a weight, rounded in {result.seconds:.0f} s, from "
        f"{result.weights.provenance['states']} states ({result.evaluations} NFE)",
        f"distance to the unquantized latents: plain {proof.plain.mean:.5f}, calibrated "
        f"{proof.calibrated.mean:.5f}, change {change.mean:+.5f} "
        f"[{change.low:+.5f}, {change.high:+.5f}]",
        f"fine detail, of the unquantized latents': plain {proof.plain.mean_detail:.1%}, calibrated "
        f"{proof.calibrated.mean_detail:.1%}",
    ]
    if proof.gain is not None:
        lines.append(f"JAQ gain over plain rounding {proof.gain}")
    layers = result.weights.layers
    if result.calibrated:
        notes = {name: layer.note for name, layer in layers.items() if layer.note}
        lines.append(f"{len(layers) - len(notes)} of {len(layers)} layers calibrated")
        lines += [f"  {markdown(name)}: rounded plainly, {note}" for name, note in notes.items()]
        remarks = {name: layer.remark for name, layer in layers.items() if layer.remark}
        lines += [f"  {markdown(name)}: {remark}" for name, remark in remarks.items()]
    return "\n".join([*lines, *map(markdown, result.remarks)])
