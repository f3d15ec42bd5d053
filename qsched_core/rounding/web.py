"""Calibrated weights as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..files import size_text
from ..statistics import Interval, mean_interval, paired_interval
from ..webpage import Bars, Caution, Compared, Curves, Part, Table, page
from .run import WeightsResult, verdict

ARMS = ("unquantized", "plain rounding", "calibrated")


def report_page(
    result: WeightsResult,
    title: str,
    sizes: tuple[int, int] | None = None,
    lines: Sequence[str] = (),
) -> str:
    """Verdict, held-out figures with 95 % intervals, sizes, every layer's error, and pictures.

    ``sizes`` are bytes of the model before and after, ``lines`` what else is to be said.
    """
    parts: list[Part] = [verdict(result)]
    parts += [Caution(remark) for remark in result.remarks]
    parts += [_figures(result), _sizes(result, sizes), *lines, _made(result)]
    parts += [*_prompts(result), *_layers(result)]
    if result.samples:
        parts.append("## Pictures")
        parts.append("The held-out prompts whose distance changed worst, in the middle, and best.")
        parts += [
            Compared(
                f"{sample.change:+.5f}: {sample.prompt}",
                [
                    (label, Image.fromarray(picture.numpy()))
                    for label, picture in zip(ARMS, sample.pictures, strict=True)
                ],
            )
            for sample in result.samples
        ]
    return page(f"Calibrated weights of {title}", parts)


def _figures(result: WeightsResult) -> Table:
    """A row an arm, and one for the paired change from plain to calibrated."""
    proof = result.proof
    plain, calibrated = proof.plain, proof.calibrated
    columns = {
        "distance to the unquantized latents": [
            "0", *(_shown(mean_interval(arm.distance), ".5f") for arm in (plain, calibrated)),
            _shown(proof.change, "+.5f"),
        ],
        "fine detail, of theirs": [
            "100%", *(_shown(mean_interval(arm.detail), ".1%") for arm in (plain, calibrated)),
            _shown(paired_interval(plain.detail, calibrated.detail), "+.1%"),
        ],
    }  # fmt: skip
    if proof.gain is not None:
        scores = (proof.reference_jaq, plain.jaq, calibrated.jaq)
        columns["JAQ"] = [
            *(_shown(mean_interval(each), ".4f") for each in scores), _shown(proof.gain, "+.4f"),
        ]  # fmt: skip
    names = (*ARMS, "calibrated - plain rounding")
    rows = [[name, *row] for name, *row in zip(names, *columns.values(), strict=True)]
    return Table([f"mean of {len(plain.distance)} held-out prompts", *columns], rows)


def _shown(interval: Interval, form: str) -> str:
    mean, low, high = (
        format(value, form) for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"


def _sizes(result: WeightsResult, sizes: tuple[int, int] | None) -> Table:
    """Of what is kept: plain rounding, where calibrated weights were no better."""
    weights = sum(math.prod(layer.packed.shape) for layer in result.weights.layers.values())
    bits = (result.plain_bits, result.bits if result.calibrated else None)
    rows = [
        ["bits a weight", "", *("" if b is None else f"{b:.3f}" for b in bits)],
        [
            "the quantized layers", "",
            *("" if b is None else size_text(round(b * weights / 8)) for b in bits),
        ],
    ]  # fmt: skip
    if sizes is not None:
        after = ["", size_text(sizes[1])] if result.calibrated else [size_text(sizes[1]), ""]
        rows.append(["the whole model", size_text(sizes[0]), *after])
    return Table(["size", *ARMS], rows)


def _made(result: WeightsResult) -> str:
    return (
        f"Rounded in {result.seconds / 60:.1f} minutes, from "
        f"{result.weights.provenance['states']} states ({result.evaluations} NFE)."
    )


def _prompts(result: WeightsResult) -> list[Part]:
    pairs = zip(result.proof.plain.distance, result.proof.calibrated.distance, strict=True)
    changes = sorted(after - before for before, after in pairs)
    lines = {"calibrated - plain": changes, "zero": [0.0] * len(changes)}
    return [Curves("change of every held-out prompt's distance, sorted", lines, "prompts")]


def _layers(result: WeightsResult) -> list[Part]:
    """What each layer's output misses: bars of the calibrated ones, and a table of all."""
    layers, chosen = result.weights.layers, result.weights.chosen
    errors = {name: layer.errors for name, layer in layers.items() if layer.errors is not None}
    parts: list[Part] = ["## Layers"]
    if errors:
        series = zip(*errors.values(), strict=True)
        values = dict(zip(ARMS[1:], series, strict=True))
        parts.append(Bars("relative output error of every layer", list(errors), values))
    rows = []
    for name, layer in layers.items():
        pair = ("", "") if layer.errors is None else (f"{error:.5f}" for error in layer.errors)
        note = f"rounded plainly: {layer.note}" if layer.note else layer.remark
        rows.append([name, chosen[name].format, f"{layer.packed.bits:.2f}", *pair, note])
    head = ["layer", "format", "bits a weight", *ARMS[1:], ""]
    return [*parts, Table(head, rows, f"all {len(rows)} layers")]
