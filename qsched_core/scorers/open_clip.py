"""Image and text features from an open_clip dual encoder, and the alignment between them.

CLIPScore: Hessel et al., arXiv 2104.08718, in the scaling of 100 * cosine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from ..optional import missing, require
from ..recent import Recent
from ..text import said, shown
from .base import (
    CLIP_SCALE,
    CLIP_SCORE_FLOOR,
    Batch,
    Placement,
    ScorerEntry,
    ScorerError,
    agree_to_download,
    in_parts,
    stay,
)
from .towers import build, checked_config, checked_preprocess, fetched_parts
from .weights import read_weights

logger = logging.getLogger(__name__)

FEATURE, INSTALL = "the open_clip scorer", "open_clip_torch"
CONFIG_KEY = "open_clip_config"
IMAGE_BATCH, TEXT_BATCH = 32, 64
TEXT_BYTES = 2**26


class DualEncoder:
    """Unit-length features of images and texts in one space.

    ``place`` brings the model to its device before each use.  ``source`` is provenance, plain JSON.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        preprocess: dict[str, Any],
        source: dict[str, Any],
        place: Placement = stay,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.source, self.place = tokenizer, source, place
        size = preprocess["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (tuple(preprocess[name]) for name in ("mean", "std"))
        self.resize_mode = preprocess.get("resize_mode", "shortest")
        if self.resize_mode not in ("shortest", "squash"):
            raise ScorerError(
                f"resize_mode={self.resize_mode!r} of {source} is not known here; "
                "use a model with 'shortest' or 'squash'"
            )
        self._texts: Recent[torch.Tensor] = Recent(TEXT_BYTES)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, height, width, 3] in [0, 1] as the encoder's input [n, 3, *size]."""
        x = images.movedim(-1, 1).float()
        height, width = self.size
        if self.resize_mode == "squash":
            x = _resize(x, height, width)
        else:
            # the rounding of sizes is torchvision's, which open_clip preprocesses with
            scale = max(height / x.shape[2], width / x.shape[3])
            x = _resize(
                x, max(height, int(x.shape[2] * scale)), max(width, int(x.shape[3] * scale))
            )
            top, left = round((x.shape[2] - height) / 2), round((x.shape[3] - width) / 2)
            x = x[..., top : top + height, left : left + width]
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (x.clamp(0, 1) - mean) / std

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Features [n, dim] (float32, CPU, unit length) of images [n, height, width, 3]."""
        device = self.place(self.model)
        features = in_parts(
            images,
            IMAGE_BATCH,
            lambda part: self.model.encode_image(self.preprocess(part.to(device))).float().cpu(),
        )
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features [n, dim] (float32, CPU, unit length); the texts used last are kept."""
        found = {text: self._texts.get(text) for text in dict.fromkeys(texts)}
        new = [text for text, features in found.items() if features is None]
        if new:
            device = self.place(self.model)
            for start in range(0, len(new), TEXT_BATCH):
                part = new[start : start + TEXT_BATCH]
                features = self.model.encode_text(self.tokenizer(part).to(device)).float().cpu()
                for text, row in zip(part, F.normalize(features, dim=-1), strict=True):
                    found[text] = row
                    self._texts.put(text, row, row.nbytes)
        return torch.stack([found[text] for text in texts])

    @property
    def logit_scale(self) -> float:
        """What the model was trained to multiply cosines with."""
        return float(self.model.logit_scale.exp())

    def describe(self) -> dict[str, Any]:
        return dict(self.source)


def _resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def load_file(
    path: str | Path,
    architecture: str = "",
    place: Placement = stay,
    allow_download: bool = False,
) -> DualEncoder:
    """Read a dual encoder from a .safetensors, .pt, .pth or .bin file.

    A safetensors file with ``open_clip_config`` in its metadata describes itself, in plain numbers;
    for any other, ``architecture`` is open_clip's name of the model.  Some of those have a tokenizer
    or a text tower that open_clip fetches: ``allow_download`` must be given for them.  Raises ScorerError (a file that can't be
    read, an architecture that is missing or unknown or does not fit), MissingDependencyError.
    """
    path = Path(path)
    open_clip = require("open_clip", FEATURE, INSTALL)
    if not path.is_file():
        raise ScorerError(f"{path} does not exist; put the scorer's weights into models/clip_score")
    embedded = _embedded_config(path)
    source = {"file": path.name, "sha256": _sha256(path)}
    if embedded is not None and not architecture:
        model, tokenizer, preprocess = _self_described(open_clip, path, embedded)
    else:
        _check_architecture(open_clip, architecture, path.name)
        source["architecture"] = architecture
        for part in fetched_parts(open_clip, architecture):
            agree_to_download(allow_download, f"architecture={shown(architecture)}: {part!r}")
        try:
            # Absolute: a bare name could be one of the weights that open_clip downloads.
            model = open_clip.create_model(
                architecture, pretrained=str(path.resolve()), weights_only=True
            )
        except Exception as error:
            # open_clip reports unreadable and unfitting files with many exception types
            raise ScorerError(
                f"{path.name} could not be read as open_clip's {architecture!r}: "
                f"{said(error)}; choose the architecture the file was made for, and a "
                "file with plain weights (safetensors, or a state dict; not a JIT archive)"
            ) from error
        tokenizer, preprocess = _named_parts(open_clip, architecture, model)
    return DualEncoder(model, tokenizer, preprocess, source, place)


def load_named(
    name: str,
    allow_download: bool = False,
    place: Placement = stay,
    folder: str | Path | None = None,
) -> DualEncoder:
    """A model by open_clip's ``architecture/pretrained`` name, for example ``ViT-B-32/openai``.

    open_clip downloads it on first use, to ``folder`` (None: a place of its own), so
    ``allow_download`` must be given.  Raises ScorerError for a name open_clip does not have, or when
    the download fails.
    """
    open_clip = require("open_clip", FEATURE, INSTALL)
    if not name:
        raise ScorerError(
            "architecture is empty; write open_clip's name as architecture/weights, for example "
            "ViT-B-32/laion2b_s34b_b79k"
        )
    architecture, _, tag = name.partition("/")
    _check_architecture(open_clip, architecture, "this model")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        known = ", ".join(f"{architecture}/{t}" for t in tags) or "none for this architecture"
        raise ScorerError(
            f"architecture={shown(name)} is not a pretrained model's name; known: {known}"
        )
    agree_to_download(allow_download, f"architecture={shown(name)}")
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=tag,
            weights_only=True,
            cache_dir=None if folder is None else str(folder),
        )
    except Exception as error:
        # network, disk and hub errors come in many types
        raise ScorerError(f"{name} could not be downloaded: {error}") from error
    tokenizer, preprocess = _named_parts(open_clip, architecture, model)
    return DualEncoder(model, tokenizer, preprocess, {"open_clip": name}, place)


def _self_described(open_clip, path: Path, config: dict):
    model_cfg = checked_config(config.get("model_cfg"), path.name)
    preprocess = checked_preprocess(config.get("preprocess_cfg"), model_cfg, path.name)
    weights = read_weights(path)
    model = build(open_clip, model_cfg, weights, path.name, f"its {CONFIG_KEY} metadata")
    return model, open_clip.SimpleTokenizer(context_length=model.context_length), preprocess


def _named_parts(open_clip, architecture: str, model):
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:
        # tokenizers from the hub fail in many ways without a network
        raise ScorerError(
            f"the tokenizer of {architecture!r} could not be loaded: {error}; choose an architecture "
            "with open_clip's own tokenizer (the ViT-B-32, ViT-L-14, ViT-H-14, ViT-bigG-14 families)"
        ) from error
    return tokenizer, open_clip.get_model_preprocess_cfg(model)


def _check_architecture(open_clip, architecture: str, file: str) -> None:
    known = open_clip.list_models()
    if architecture in known:
        return
    examples = "ViT-B-32, ViT-B-32-quickgelu (OpenAI's weights), ViT-L-14, ViT-H-14"
    if not architecture:
        raise ScorerError(
            f"{file} does not say which model it is; set architecture to open_clip's name of it, "
            f"for example {examples}"
        )
    raise ScorerError(
        f"architecture={shown(architecture)} is not one of open_clip's {len(known)} models, such as "
        f"{examples}; see open_clip.list_models()"
    )


def _embedded_config(path: Path) -> dict | None:
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
        config = None if text is None else json.loads(text)
    except (SafetensorError, OSError) as error:
        raise ScorerError(f"{path.name} is not a readable safetensors file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ScorerError(f"{path.name}: its {CONFIG_KEY} metadata is not JSON: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise ScorerError(f"{path.name}: its {CONFIG_KEY} metadata must be an object")
    return config


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ClipAlignment:
    """CLIPScore [n]: 100 times the cosine between image and prompt, at least 1.

    An image that has nothing to do with its prompt keeps a finite logarithm.
    """

    name = "clip"

    def __init__(self, encoder: DualEncoder):
        self.encoder = encoder

    def score(self, batch: Batch) -> torch.Tensor:
        texts = self.encoder.encode_texts(batch.prompts)
        cosine = (batch.image_features * texts).sum(1)
        return (CLIP_SCALE * cosine).clamp(min=CLIP_SCORE_FLOOR)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "encoder": self.encoder.describe()}


ENTRY = ScorerEntry(
    name="clip",
    measures="alignment",
    licence="open_clip: MIT; weights: their publishers' licences",
    available=lambda: missing("open_clip", FEATURE, INSTALL),
    build=lambda option, sources: ClipAlignment(sources.encoder),
)
