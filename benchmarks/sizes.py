"""How large the published models are in each format, and which fits on which card: README's table.

``size.FORMAT.MODEL``: GB (1e9 bytes) of the diffusion model in that format beside bf16, computed from
the published shapes with the pack's own policy; nothing is measured, and no weights are needed.  The
printed table has for each card the most precise format that leaves ``--spare`` GB of it free:
activations, and what else is on the card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qsched_core.formats.policy import Policy

from ._common import BenchRow, report
from ._families import FAMILIES
from ._host import import_pack
from .loading import stored_bytes

FORMATS = ("int8", "nf4", "int3", "int2")  # the most precise first
CARDS = (4, 6, 8, 12, 16, 24)  # GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--spare", type=float, default=2.0, metavar="GB")
    options = parser.parse_args()
    import_pack()
    rows: list[BenchRow] = []
    lines = []
    for name, family in FAMILIES.items():
        sizes = {}
        for form in FORMATS:
            half, stored = stored_bytes(family, Policy(form))
            sizes[form] = stored / 1e9
            rows.append(
                BenchRow(
                    f"size.{form}.{name}", f"bf16 over {form}", stored / 1e9, half / 1e9,
                    half / stored, "GB", 1, "computed from shapes",
                )
            )  # fmt: skip
        sizes = {"bf16": half / 1e9, **sizes}
        cells = [_fitting(sizes, card - options.spare) for card in CARDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    report(rows, options.json)
    print("\n| | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("| --- |" + " --- |" * len(CARDS))
    print("\n".join(lines))


def _fitting(sizes: dict[str, float], room: float) -> str:
    for form, size in sizes.items():
        if size <= room:
            return f"{form}, {size:.1f} GB"
    form, size = list(sizes.items())[-1]
    return f"{form}, {size:.1f} GB, partly offloaded"


if __name__ == "__main__":
    main()
