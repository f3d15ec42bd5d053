"""Tiny models under the file names of published ones, so that the templates run as they are.

The transformer and UNet are random and as small as ComfyUI's detection allows.  Text encoders can't
be small, for ComfyUI fixes their sizes: CLIP-L is the demo's, SDXL's CLIP-G is zeros, and T5-XXL (4.7 billion weights) is left out, see ``NO_T5``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path
from types import MappingProxyType

import torch
from hostpath import ROOT, comfyui_folder
from PIL import Image
from safetensors.torch import load_file, save

from demo.build import CHECKPOINT, build_models
from demo.text import clip_l_state_dict

# DualCLIPLoader of type "flux" builds a whole T5-XXL, whatever the file holds; of type "sd3" it
# builds what it finds.  CLIP-L alone then gives 2048 pooled features, so the stand-in takes those.
NO_T5 = {"flux": "sd3"}
POOLED = 2048
CANVASES = ("classic", "nodes 2.0")
CLIP_L = "text_encoders.clip_l.transformer."


def place(models: Path) -> None:
    """Every file that the templates name, below ``models``."""
    demo = ROOT / ".host" / "cache" / "models"
    build_models(demo)
    for source in demo.rglob("*.safetensors"):
        _link(source, models / source.relative_to(demo))
    _link(demo / CHECKPOINT, models / "checkpoints" / "sd3.5_large_turbo.safetensors")
    whole = load_file(demo / CHECKPOINT)
    _save(models / "vae" / "ae.safetensors", _part(whole, "first_stage_model."))
    texts = clip_l_state_dict()
    encoders = models / "text_encoders"
    _save(encoders / "clip_l.safetensors", _part(texts, CLIP_L))
    # A file of one weight: no encoder is built for it, and CLIP-L takes it, having the same one.
    one = {k.removeprefix(CLIP_L): v for k, v in texts.items() if "layers.1.mlp.fc1.weight" in k}
    for name in ("t5xxl_fp16", "clip_g"):
        _save(encoders / f"{name}.safetensors", one)
    _families(models, texts)


def _families(models: Path, texts: dict[str, torch.Tensor]) -> None:
    sys.path.insert(0, str(comfyui_folder()))
    importlib.import_module("comfy.cli_args").args.cpu = True
    families = importlib.import_module("families")
    small = families.FLUX_SCHNELL
    flux = families.Small(small.family.smaller(vec_in_dim=POOLED), small.latent, small.context)
    _save(models / "diffusion_models" / "flux1-schnell.safetensors", flux.weights())
    vae = importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4).state_dict()
    weight, random = families.real.random_weight, torch.Generator().manual_seed(0)
    vae = {k: weight(k, v.shape, random) if v.ndim else v for k, v in vae.items()}
    sdxl = {f"model.diffusion_model.{k}": v for k, v in families.SDXL.weights().items()}
    sdxl |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    root = "conditioner.embedders.0.transformer."
    sdxl |= {root + k: v for k, v in _part(texts, CLIP_L).items()}
    _save(models / "checkpoints" / "sdxl_lightning_4step.safetensors", sdxl, _clip_g())


def picture(folder: Path) -> None:
    """The input picture that every ComfyUI has."""
    Image.linear_gradient("L").convert("RGB").save(folder / "example.png")


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _clip_g() -> dict[str, tuple[int, ...]]:
    """The shapes of SDXL's second text encoder: 32 layers, 1280 wide."""
    root, wide = "conditioner.embedders.1.model.", 1280
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, wide),
        "token_embedding.weight": (49408, wide),
        "text_projection": (wide, wide),
        "logit_scale": (),
        "ln_final.weight": (wide,),
        "ln_final.bias": (wide,),
    }
    for layer in range(32):
        for name, shape in (
            ("attn.in_proj_weight", (3 * wide, wide)), ("attn.in_proj_bias", (3 * wide,)),
            ("attn.out_proj.weight", (wide, wide)), ("attn.out_proj.bias", (wide,)),
            ("mlp.c_fc.weight", (4 * wide, wide)), ("mlp.c_fc.bias", (4 * wide,)),
            ("mlp.c_proj.weight", (wide, 4 * wide)), ("mlp.c_proj.bias", (wide,)),
            ("ln_1.weight", (wide,)), ("ln_1.bias", (wide,)),
            ("ln_2.weight", (wide,)), ("ln_2.bias", (wide,)),
        ):  # fmt: skip
            shapes[f"transformer.resblocks.{layer}.{name}"] = shape
    return {root + name: shape for name, shape in shapes.items()}


def _save(path: Path, state: dict[str, torch.Tensor], zeros=MappingProxyType({})) -> None:
    """A safetensors file; ``zeros`` are shapes of fp16 zeros, which take no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({k: v.contiguous() for k, v in state.items()})
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    end = len(data)
    for name, shape in zeros.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        file.truncate(8 + len(text) + end)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
