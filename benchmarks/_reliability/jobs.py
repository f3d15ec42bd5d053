"""The work that is killed: this project's commands, and saving a quantized model again and again.

Everything is imported here, so that a process which is forked from one that imported this begins at once.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import safetensors.torch
import torch

from demo.build import CONTEXT_WIDTH, weights_dir
from demo.mmdit import MMDiT
from qsched_core.cli import calibrate, calibrate_weights, evaluate
from qsched_core.optional import require

from .._host import PACK, import_pack

COMMANDS = {
    "calibrate": calibrate.main,
    "calibrate_weights": calibrate_weights.main,
    "evaluate": evaluate.main,
}
NAMES = tuple(f"model_{number:05}_.safetensors" for number in range(1, 7))

require("optuna", "the search", "optuna")
loading = import_pack()
saving = importlib.import_module(f"{PACK}.nodes.host.weights.saving")


def run(name: str, arguments: list[str], folder: Path) -> int:
    """The exit code of the job; ``folder`` is for what several runs share."""
    torch.set_num_threads(1)
    if name in COMMANDS:
        return COMMANDS[name](arguments)
    save(Path(arguments[0]), folder / "source.safetensors")
    return 0


def save(folder: Path, source: Path) -> None:
    """A quantized model under six names, those that are there already left out."""
    if not source.exists():
        safetensors.torch.save_file(demo_model(), source)
    model = loading.load_diffusion_model(str(source), loading.Request("int8"))
    for name in NAMES:
        if not (folder / name).exists():
            path, _ = saving.save_model(model, iter([folder / name]))
            sys.stdout.write(f"saved {path}\n")


def demo_model() -> dict[str, torch.Tensor]:
    """The demo's generator as a file of diffusion_models, by ComfyUI's names."""
    weights = safetensors.torch.load_file(weights_dir() / "mmdit.safetensors")
    weights.setdefault("pos_embed", MMDiT().pos_embed)
    narrow = weights["context_embedder.weight"]
    wide = torch.zeros(len(narrow), CONTEXT_WIDTH, dtype=narrow.dtype)
    wide[:, : narrow.shape[1]] = narrow
    return weights | {"context_embedder.weight": wide}
