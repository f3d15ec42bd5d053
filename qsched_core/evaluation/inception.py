"""Inception features for FID, from weights that are on this machine already.

Two sets of weights exist.  "tf" is the network of the original FID (arXiv 1706.08500) in torch, which
pyiqa and pytorch-fid keep; its distances compare with published ones.  "torchvision" was
trained separately: its distances compare only with one another.  Nothing is downloaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..optional import missing, require
from ..scorers import Placement, ScorerError, stay
from ..text import said
from .base import FeatureSpace

FEATURE, INSTALL = "FID in Inception features", "torchvision"
SIZE, BATCH = 299, 16
TF, TORCHVISION = "tf", "torchvision"
# Where pyiqa, pytorch-fid and torchvision keep them, below torch's hub folder.
FILES = {
    "pyiqa/pt_inception-2015-12-05-6726825d.pth": TF,
    "checkpoints/pt_inception-2015-12-05-6726825d.pth": TF,
    "checkpoints/inception_v3_google-0cc3c7bd.pth": TORCHVISION,
}
NOT_PUBLISHED = (
    "FID is from torchvision's Inception weights, not those of the published FID: compare it between "
    "these arms alone"
)


@dataclass(frozen=True)
class Weights:
    """A file with Inception weights of ``kind`` "tf" or "torchvision"."""

    path: Path
    kind: str


def find_weights(hub: str | Path | None = None) -> Weights | None:
    """The weights below ``hub`` (torch's own folder by default), those of the published FID first."""
    root = Path(torch.hub.get_dir() if hub is None else hub)
    for name, kind in FILES.items():
        if (root / name).is_file():
            return Weights(root / name, kind)
    return None


def available(hub: str | Path | None = None) -> str | None:
    """Why FID can't be given, with what helps; None if it can."""
    reason = missing("torchvision", FEATURE, INSTALL)
    if reason is None and find_weights(hub) is None:
        reason = (
            f"{FEATURE} needs weights, which are not downloaded; put {list(FILES)[1]} into torch's hub "
            "folder"
        )
    return reason


def inception_space(hub: str | Path | None = None, place: Placement = stay) -> FeatureSpace:
    """The features of :func:`find_weights`' file, 2048 numbers an image.

    ScorerError where :func:`available` has a reason, and for a file that does not fit.
    """
    reason = available(hub)
    if reason:
        raise ScorerError(reason)
    weights = find_weights(hub)
    model = _load(weights)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        device = place(model)
        return torch.cat([_features(model, p.to(device)).cpu() for p in images.split(BATCH)])

    return FeatureSpace(
        "inception",
        encode,
        {"features": "inception", "weights": weights.kind, "file": weights.path.name},
        NOT_PUBLISHED if weights.kind == TORCHVISION else "",
    )


def _features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features [n, 2048] of images [n, height, width, 3] in [0, 1], resized with antialiasing.

    Resizing as in clean-fid (arXiv 2104.11222); the network sees [-1, 1].
    """
    x = images.movedim(-1, 1).float().clamp(0, 1)
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    return model(2 * x.clamp(0, 1) - 1).float()


def _load(weights: Weights) -> torch.nn.Module:
    torchvision = require("torchvision", FEATURE, INSTALL)
    tf = weights.kind == TF
    model = torchvision.models.Inception3(
        num_classes=1008 if tf else 1000,
        aux_logits=not tf,
        inception_blocks=_tf_blocks(torchvision.models.inception) if tf else None,
        init_weights=False,
    )
    try:
        state = torch.load(weights.path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        # unreadable and unfitting files raise many exception types
        raise ScorerError(
            f"{weights.path} does not hold the Inception weights its name promises "
            f"({said(error)}); delete it"
        ) from error
    model.fc, model.dropout = torch.nn.Identity(), torch.nn.Identity()
    return model.eval().requires_grad_(False)


def _tf_blocks(inception) -> list:
    """torchvision's blocks with the pooling of the published FID's network.

    Its averages leave the padding out, and its last block takes maxima.
    """
    average = functools.partial(
        F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
    )
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)

    def pooled(block, pool):
        class Pooled(block):
            def _forward(self, x):
                return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

        return Pooled

    a, c = (pooled(block, average) for block in (inception.InceptionA, inception.InceptionC))
    inner, last = (pooled(inception.InceptionE, pool) for pool in (average, maximum))

    def e(channels, **more):
        return (last if channels == 2048 else inner)(channels, **more)

    return [
        inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e,
        inception.InceptionAux,
    ]  # fmt: skip
