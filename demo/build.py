"""Build the files ComfyUI needs for the demo: ``python -m demo.build --models DIR``.

The checkpoint (272 MB) is the shipped generator and autoencoder plus a text encoder that is
generated here, under the key names of an SD3 checkpoint, so ComfyUI's own nodes load it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# torch and open_clip are imported where they are used: finding that all is up to date is instant.

WORK_DIR = Path(__file__).parent / ".work"
WEIGHTS_DIR = Path(__file__).parent / "weights"
CHECKPOINT = "checkpoints/qsched_demo.safetensors"
SCORER = "clip_score/qsched_demo_scorer.safetensors"
CONTEXT_WIDTH = 4096  # what ComfyUI pads SD3's text features to
STAMP = "qsched_demo_source"
TRAINED = ("mmdit", "vae", "scorer")  # file names, in training and as shipped


def weights_dir() -> Path:
    """The shipped weights; what training has left so far, where there are none."""
    shipped = WEIGHTS_DIR / "mmdit.safetensors"
    return WEIGHTS_DIR if shipped.exists() or not WORK_DIR.exists() else WORK_DIR


def _find(source: Path, name: str) -> Path:
    path = source / f"{name}.safetensors"
    if path.exists():
        return path
    raise FileNotFoundError(
        f"no {name}.safetensors in {source}; restore demo/weights from the repository, "
        f"or train it with demo/train_{name}.py"
    )


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a whole safetensors file; {} if it is missing, cut short or not one."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        tensors = (v for k, v in header.items() if k != "__metadata__")
        end = max(v["data_offsets"][1] for v in tensors)
        return header.get("__metadata__", {}) if path.stat().st_size == 8 + length + end else {}
    except (OSError, ValueError, struct.error):
        return {}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write; it takes the place of ``path`` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.chmod(0o644)  # safetensors makes files that others cannot read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _save(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(v.numel() * v.element_size() for v in state.values())
    free = shutil.disk_usage(path.parent).free
    if free < 1.1 * size:
        raise OSError(f"{path} needs {size >> 20} MB but {path.parent} has {free >> 20} MB free")
    with _whole(path) as partial:
        save_file({k: v.contiguous() for k, v in state.items()}, partial, metadata)


def checkpoint_state(
    mmdit: dict[str, torch.Tensor], vae: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state dict of the whole checkpoint in float16, by ComfyUI's names."""
    import torch

    from .taesd import SD3_SCALE, SD3_SHIFT
    from .text import clip_l_state_dict

    state = {f"model.diffusion_model.{k}": v.half() for k, v in mmdit.items()}
    name = "model.diffusion_model.context_embedder.weight"
    narrow = state[name]
    state[name] = narrow.new_zeros(narrow.shape[0], CONTEXT_WIDTH)
    state[name][:, : narrow.shape[1]] = narrow
    state |= {f"first_stage_model.{k}": v.half() for k, v in vae.items()}
    state["first_stage_model.vae_scale"] = torch.tensor(SD3_SCALE)
    state["first_stage_model.vae_shift"] = torch.tensor(SD3_SHIFT)
    return state | clip_l_state_dict()


def build_checkpoint(path: Path, source: Path | None = None) -> bool:
    """Write the checkpoint to ``path`` unless it is up to date; True if it was written.

    ``source`` is a folder with mmdit and vae weights, demo/weights by default.
    FileNotFoundError names what is missing; OSError if the disk is full.
    """
    source = source or weights_dir()
    parts = [_find(source, name) for name in ("mmdit", "vae")]
    here = Path(__file__)
    stamp = _hash(*parts, here, here.with_name("text.py"))
    if _metadata(path).get(STAMP) == stamp:
        return False
    from safetensors.torch import load_file

    from .mmdit import MMDiT

    mmdit, vae = (load_file(part) for part in parts)
    mmdit.setdefault("pos_embed", MMDiT().pos_embed)
    _save(checkpoint_state(mmdit, vae), path, {"format": "pt", STAMP: stamp})
    return True


def build_scorer(path: Path, source: Path | None = None) -> bool:
    """Copy the scorer to ``path`` unless it is up to date; True if it was written."""
    scorer = _find(source or weights_dir(), "scorer")
    if path.exists() and _hash(path) == _hash(scorer):
        return False
    with _whole(path) as partial:
        shutil.copyfile(scorer, partial)
    return True


def build_models(models: Path, source: Path | None = None) -> list[Path]:
    """Put the demo's checkpoint and scorer into a ComfyUI ``models`` folder; returns what was written."""
    models = Path(models)
    written = []
    for name, build in ((CHECKPOINT, build_checkpoint), (SCORER, build_scorer)):
        if build(models / name, source):
            written.append(models / name)
    return written


def export_weights(source: Path = WORK_DIR, target: Path = WEIGHTS_DIR) -> dict[str, int]:
    """Trained weights to the float16 files that are shipped, metadata kept; bytes by name."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    sizes = {}
    for name in TRAINED:
        path = _find(source, name)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        _save(state, target / f"{name}.safetensors", metadata)
        sizes[name] = (target / f"{name}.safetensors").stat().st_size
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="ComfyUI's models folder to build into")
    parser.add_argument("--source", type=Path, help="folder of the weights; demo/weights if unset")
    parser.add_argument("--export", action="store_true", help="trained weights to demo/weights")
    args = parser.parse_args()
    if not (args.export or args.models):
        parser.error("nothing to do; give --models DIR, --export or both")
    try:
        if args.export:
            for name, size in export_weights(args.source or WORK_DIR).items():
                print(f"{name}: {size / 1e6:.1f} MB")
        for path in build_models(args.models, args.source) if args.models else ():
            print(f"wrote {path}")
    except OSError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
