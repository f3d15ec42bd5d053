"""Any no-reference metric of pyiqa, by name.  pyiqa is PolyForm-Noncommercial licensed."""

from __future__ import annotations

from typing import Any

import torch

from ..optional import missing, require
from .base import (
    Batch,
    Placement,
    ScorerEntry,
    ScorerError,
    Sources,
    agree_to_download,
    in_parts,
    stay,
)

LICENCE = "PolyForm-Noncommercial-1.0.0 (no commercial use); metrics' weights have their own"
FEATURE, INSTALL = f"a pyiqa metric (licence {LICENCE})", "pyiqa"
IMAGE_BATCH = 8


class PyiqaMetric:
    """A no-reference metric [n] in its own scale; one where lower is better is negated.

    pyiqa downloads a metric's weights on first use, so ``allow_download`` must be given.  Raises
    ScorerError for a name pyiqa does not have, for a metric that needs a reference, or when its
    weights can't be obtained; MissingDependencyError without pyiqa.
    """

    def __init__(self, metric: str, place: Placement = stay, allow_download: bool = False):
        pyiqa = require("pyiqa", FEATURE, INSTALL)
        known = pyiqa.list_models(metric_mode="NR")
        if metric not in known:
            raise ScorerError(
                f"quality='pyiqa:{metric}' is not a no-reference metric of pyiqa; "
                f"choose one of {', '.join(known)}"
            )
        agree_to_download(allow_download, f"the weights of quality='pyiqa:{metric}'")
        try:
            self.model = pyiqa.create_metric(metric, device=torch.device("cpu"))
        except Exception as error:
            # weights come from the network: errors of many types
            raise ScorerError(
                f"quality='pyiqa:{metric}' could not be built: {error}; pyiqa downloads the metric's "
                "weights on first use, so check the network"
            ) from error
        self.metric, self.place, self.version = metric, place, getattr(pyiqa, "__version__", "")
        self.lower_better = bool(self.model.lower_better)
        self.name = f"pyiqa:{metric}"

    @torch.no_grad()
    def score(self, batch: Batch) -> torch.Tensor:
        device = self.place(self.model) if any(self.model.parameters()) else torch.device("cpu")
        scores = in_parts(
            batch.images,
            IMAGE_BATCH,
            lambda part: (
                self.model(part.movedim(-1, 1).float().clamp(0, 1).to(device)).reshape(-1).cpu()
            ),
        ).float()
        return -scores if self.lower_better else scores

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "sign": -1 if self.lower_better else 1,
            "licence": LICENCE,
        }


def _build(option: str, sources: Sources) -> PyiqaMetric:
    if not option:
        raise ScorerError("quality='pyiqa' names no metric; write for example 'pyiqa:musiq'")
    return PyiqaMetric(option, sources.place, sources.allow_download)


ENTRY = ScorerEntry(
    name="pyiqa",
    measures="quality",
    licence=LICENCE,
    available=lambda: missing("pyiqa", FEATURE, INSTALL),
    build=_build,
    option_hint="metric",
)
