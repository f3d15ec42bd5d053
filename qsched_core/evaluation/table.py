"""What an evaluation found, as text and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from io import StringIO

from ..statistics import Interval
from ..text import csv_cell, markdown, plain
from .results import REFERENCES, Comparison, Evaluation

Escape = Callable[[str], str]


def verdict(evaluation: Evaluation, comparison: Comparison, escape: Escape = plain) -> str:
    """One line: whether ``after`` scores better than ``before``, with the numbers."""
    labels = _labels(evaluation, escape)
    pair = f"{labels[comparison.after]} against {labels[comparison.before]}"
    gain = comparison.gains.get("jaq")
    if gain is None:
        return f"{pair}: one prompt can't tell"
    if gain.low > 0:
        kind = "better"
    elif gain.high < 0:
        kind = "worse"
    else:
        kind = "no difference that can be told from chance"
    return f"{pair}: {kind}, JAQ {gain}"


def _labels(evaluation: Evaluation, escape: Escape) -> dict[str, str]:
    return {arm.name: escape(arm.label) for arm in evaluation.arms} | {REFERENCES: REFERENCES}


def distance_lines(evaluation: Evaluation, escape: Escape = plain) -> list[str]:
    """A line for each Frechet distance, and for each change of one."""
    labels = _labels(evaluation, escape)
    changes = [
        f"{labels[c.after]} is {_nearer(c.change)} {labels[c.against]} than {labels[c.before]} "
        f"({escape(c.space)}): {c.change.mean:+.5f} [{c.change.low:+.5f}, {c.change.high:+.5f}]"
        for c in evaluation.changes
    ]
    return [
        f"Frechet distance ({escape(d.space)}, {d.dimensions} dimensions) of {labels[d.arm]} from "
        f"{labels[d.against]}: {round(d.value, 9):.5g} ({d.images} and {d.against_images} images)"
        for d in evaluation.distances
    ] + changes


def _nearer(change: Interval) -> str:
    if change.high < 0:
        return "nearer to"
    return "farther from" if change.low > 0 else "not told from chance nearer to or farther from"


def cost_line(evaluation: Evaluation) -> str:
    """Images, model evaluations and seconds, and what was on disk already."""
    images = len(evaluation.prompts) * len(evaluation.arms)
    nfe = sum(arm.nfe for arm in evaluation.arms)
    seconds = sum(arm.seconds for arm in evaluation.arms)
    return (
        f"{images} images ({images - evaluation.new_images} from earlier runs), {nfe} model "
        f"evaluations (NFE), {seconds:.0f} s"
    )


def report_text(evaluation: Evaluation) -> str:
    """The verdicts, means and gains of every score with 95 % intervals, distances, notes, cost.

    Names in it are escaped, for a page that renders Markdown or HTML.
    """
    labels = _labels(evaluation, markdown)
    names = list(evaluation.arms[0].columns)
    lines = [verdict(evaluation, comparison, markdown) for comparison in evaluation.comparisons]
    heads = [labels[arm.name] for arm in evaluation.arms]
    rows = [("mean of " + _prompts(len(evaluation.prompts)), *heads)]
    rows += [
        (markdown(name), *(_short(arm.intervals[name]) for arm in evaluation.arms))
        for name in names
    ]
    lines += ["", *_aligned(rows)]
    gained = [c for c in evaluation.comparisons if c.gains]
    if gained:
        rows = [("paired gain", *(f"{labels[c.after]} - {labels[c.before]}" for c in gained))]
        rows += [(markdown(name), *(_short(c.gains[name], "+") for c in gained)) for name in names]
        lines += ["", *_aligned(rows)]
    lines += ["", *distance_lines(evaluation, markdown)] if evaluation.distances else []
    lines += ["", *(f"note: {markdown(note)}" for note in evaluation.notes), cost_line(evaluation)]
    return "\n".join(lines).lstrip("\n")


def _prompts(count: int) -> str:
    return f"{count} prompt{'s' if count > 1 else ''}"


def _short(interval: Interval, sign: str = "") -> str:
    numbers = (interval.mean, interval.low, interval.high)
    mean, low, high = (format(number, f"{sign}.4f") for number in numbers)
    return f"{mean} [{low}, {high}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def images_csv(evaluation: Evaluation) -> str:
    """A row an image: arm, prompt number (from 1), prompt, seed, and every score."""
    names = list(evaluation.arms[0].columns)
    prompts = evaluation.prompts
    return _csv(
        ["arm", "number", "prompt", "seed", *names],
        (
            [arm.name, i + 1, prompts.prompts[i], prompts.seeds[i],
             *(arm.columns[name][i] for name in names)]
            for arm in evaluation.arms
            for i in range(len(prompts))
        ),
    )  # fmt: skip


def summary_csv(evaluation: Evaluation) -> str:
    """A row a number: means of every score, paired gains, Frechet distances, with 95 % intervals."""

    def row(quantity, arm, against, interval: Interval):
        ends = (interval.mean, interval.low, interval.high)
        return [quantity, arm, against, *ends, interval.n]

    rows = [
        row(f"mean {name}", arm.name, "", interval)
        for arm in evaluation.arms
        for name, interval in arm.intervals.items()
    ]
    rows += [
        row(f"gain {name}", comparison.after, comparison.before, gain)
        for comparison in evaluation.comparisons
        for name, gain in comparison.gains.items()
    ]
    rows += [
        [f"frechet {d.space}", d.arm, d.against, d.value, "", "", d.images]
        for d in evaluation.distances
    ]
    rows += [
        row(f"frechet change {c.space}, {c.before} to {c.after}", c.after, c.against, c.change)
        for c in evaluation.changes
    ]
    return _csv(["quantity", "arm", "against", "value", "low", "high", "n"], rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([csv_cell(cell) for cell in row])
    return text.getvalue()
