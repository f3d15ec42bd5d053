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


def wired(weight_format: str, seed: int) -> dict:
    """Model and text encoder quantized after loading; the nodes for graphs of single samplers."""
    common = {
        "model": ["2", 0], "positive": ["4", 0], "negative": ["4", 0], "latent_image": ["5", 0],
        "noise_seed": seed, "cfg": 1.0,
    }  # fmt: skip
    custom = common | {"add_noise": True, "sigmas": ["7", 0]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node(
            "QSchedQuantizeModel", model=["1", 0], weight_format=weight_format, layers="*mlp*=int8"
        ),
        "3": node("QSchedQuantizeTextEncoder", clip=["1", 1], weight_format=weight_format, layers=""),
        "4": node("CLIPTextEncode", clip=["3", 0], text=CAPTION),
        "5": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "6": node(
            "QSchedRamp", model=["2", 0], scheduler="simple", steps=2, solver="euler",
            x_start=1.0, x_end=1.0, eps_start=1.05, eps_end=1.0,
        ),
        "7": node("QSchedSigmas", schedule=["6", 0], scheduler="simple", steps=0, denoise=1.0),
        "8": node("QSchedSampler", schedule=["6", 0], solver="euler", mode="strict", eta=-1.0),
        "9": node("KSamplerSelect", sampler_name="euler"),
        "10": node("QSchedAroundSampler", schedule=["6", 0], sampler=["9", 0], mode="interpolate"),
        "11": node("SamplerCustom", sampler=["8", 0], **custom),
        "12": node("SamplerCustom", sampler=["10", 0], **custom),
        "13": node(
            "QSchedKSamplerAdvanced", **common, add_noise="enable", steps=2, solver="euler",
            scheduler="as learned", start_at_step=0, end_at_step=1,
            return_with_leftover_noise="enable", schedule=["6", 0],
        ),
        "14": node("VAEDecode", samples=["11", 0], vae=["1", 2]),
        "15": node("PreviewImage", images=["14", 0]),
        "16": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
        "17": node("QSchedJAQScore", images=["14", 0], objective=["16", 0], prompts=CAPTION),
        "18": node("PreviewAny", source=["12", 0]),
        "19": node("PreviewAny", source=["13", 0]),
    }  # fmt: skip


def ranking(weight_format: str, seed: int) -> dict:
    """A round of candidates to rank."""
    inputs = _trajectory(prompts=CAPTION, ranking="", study="of a mutant", seed=seed, candidates=3)
    inputs.pop("objective")
    return {
        "1": node("QSchedLoadCheckpoint", ckpt_name=CHECKPOINT, weight_format=weight_format),
        "4": node("QSchedRankCandidates", **inputs),
    }


def rounding(weight_format: str) -> dict:
    """Weights that are calibrated with just as many prompts as their layers need."""
    inputs = _trajectory(weight_format=weight_format, states_per_prompt=2, layers="*mlp*=nf4")
    inputs.pop("objective")
    lines = {
        name: "\n".join(f"{name}, a red circle and {n} rings" for n in range(count))
        for name, count in (("calibration", 12), ("heldout", 12))
    }
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("QSchedCalibrationPrompts", source="text", seed=0, **lines),
        "4": node("QSchedCalibrateWeights", **inputs),
    }


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
def server(base: Path, *more: str, **environment: str) -> Iterator[ComfyServer]:
    """A real server on ``base``, with ComfyUI from COMFYUI_PATH."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    variables = {"OMP_NUM_THREADS": "1", "QSCHED_GRACE_SECONDS": "20"} | environment
    with ComfyServer(
        comfyui, base, extra_args=(*device_args(), *more), environment=variables
    ) as running:
        yield running
