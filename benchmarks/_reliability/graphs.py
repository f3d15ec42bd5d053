"""Workflows that the attacks on real servers queue: the demo model in 96 pixels and two steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.build import build_models
from devtools.server import ComfyServer, device_args

CAPTION = "a red circle to the left of a green square on a white background"
SCORER = "qsched_demo_scorer.safetensors"
CHECKPOINT = "qsched_demo.safetensors"
ROOT = Path(__file__).resolve().parents[2]


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def sampling(weight_format: str, seed: int, save: bool = False) -> dict:
    """Load quantized, a ramp's schedule, sample, decode, show."""
    loader = node("QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format=weight_format)
    return {
        "1": loader,
        "2": node("CLIPTextEncode", clip=["1", 1], text=f"{CAPTION}, {seed % 7}"),
        "3": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "4": node(
            "QSchedRamp", model=["1", 0], scheduler="simple", steps=2, solver="euler",
            x_start=1.0, x_end=1.0, eps_start=1.02 + seed % 5 / 100, eps_end=1.0,
        ),
        "5": node(
            "QSchedKSampler", model=["1", 0], positive=["2", 0], negative=["2", 0],
            latent_image=["3", 0], schedule=["4", 0], seed=seed, steps=2, cfg=1.0, solver="euler",
            scheduler="simple", denoise=1.0, mode="interpolate",
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="soak") if save
        else node("PreviewImage", images=["6", 0]),
    }  # fmt: skip


def searched(weight_format: str, seed: int) -> dict:
    """Everything that a search or an evaluation needs beside itself."""
    return {
        "1": node("QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format=weight_format),
        "2": node(
            "QSchedCalibrationPrompts", source="text", seed=seed,
            calibration=f"{CAPTION}\na blue ring", heldout=f"a green square, {seed}\na red ring",
        ),
        "3": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
    }  # fmt: skip


def _trajectory(**more) -> dict:
    return {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "prompts": ["2", 0],
        "objective": ["3", 0], "solver": "euler", "scheduler": "simple", "steps": 2, "cfg": 1.0,
        "width": 96, "height": 96,
    } | more  # fmt: skip


def evaluating(weight_format: str, seed: int) -> dict:
    return searched(weight_format, seed) | {"4": node("QSchedEvaluate", **_trajectory())}


def calibrating(weight_format: str, seed: int, **more) -> dict:
    inputs = _trajectory(search="gp", budget=5, seed=seed, guard=False, **more)
    return searched(weight_format, 0) | {"4": node("QSchedJAQCalibrator", **inputs)}


def saving(weight_format: str, prefix: str, layers: str = "") -> dict:
    """A saved diffusion model; ``layers`` only makes it another prompt."""
    loader = node(
        "QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format=weight_format, layers=layers
    )
    return {
        "1": loader,
        "2": node("QSchedSaveModel", model=["1", 0], filename_prefix=prefix),
    }


def models(base: Path) -> None:
    """The demo's models in a server's base folder, as links where the system has them."""
    kept = ROOT / ".host" / "cache" / "models"
    build_models(kept)
    for source in kept.rglob("*.safetensors"):
        target = base / "models" / source.relative_to(kept)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


@contextmanager
def server(base: Path, *more: str) -> Iterator[ComfyServer]:
    """A real server on ``base``, with ComfyUI from COMFYUI_PATH."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    variables = {"OMP_NUM_THREADS": "1", "QSCHED_GRACE_SECONDS": "20"}
    with ComfyServer(
        comfyui, base, extra_args=(*device_args(), *more), environment=variables
    ) as running:
        yield running
