"""Model families at their published sizes, as ComfyUI's own modules on the meta device.

Configurations are those that ComfyUI 0.30.0 detects in the published files.  ComfyUI must be
importable where a function here is called.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHUNK = 1 << 22  # weights drawn at once


@dataclass(frozen=True)
class Family:
    """One family of diffusion models.

    ``target`` is ComfyUI's module as "package.module:Class", ``config`` its arguments, and
    ``detected`` the class of comfy.supported_models that ComfyUI takes such weights for.
    """

    name: str
    target: str
    config: Mapping[str, Any]
    detected: str

    def module(self) -> torch.nn.Module:
        """The diffusion model without memory: every tensor is on the meta device."""
        path, name = self.target.split(":")
        make = getattr(importlib.import_module(path), name)
        ops = importlib.import_module("comfy.ops").disable_weight_init
        with torch.device("meta"):
            return make(**self.config, device="meta", dtype=torch.float16, operations=ops)

    def smaller(self, name: str = "", detected: str = "", **changes) -> Family:
        """A member with other arguments; one that is given as None is left out."""
        config = {**self.config, **changes}
        config = {k: v for k, v in config.items() if k not in changes or v is not None}
        return dataclasses.replace(
            self, name=name or self.name, config=config, detected=detected or self.detected
        )


@dataclass(frozen=True)
class Weight:
    """One tensor of a model; ``kind`` is "linear", "conv2d", or "" where it is no layer's weight."""

    key: str
    shape: tuple[int, ...]
    kind: str = ""

    @property
    def layer(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weights(module: torch.nn.Module) -> Iterator[Weight]:
    """Every tensor of the module's state dict."""
    kinds = {}
    for name, layer in module.named_modules():
        for kind, of in (("linear", torch.nn.Linear), ("conv2d", torch.nn.Conv2d)):
            if isinstance(layer, of):
                kinds[f"{name}.weight"] = kind
    for key, value in module.state_dict().items():
        yield Weight(key, tuple(value.shape), kinds.get(key, ""))


def random_weight(
    key: str, shape: tuple[int, ...], random: torch.Generator, rows: slice = slice(None)
) -> torch.Tensor:
    """fp16 values for (some rows of) a weight, with no layer switched off as in a fresh model.

    Layers keep the variance of their input; norms scale by about 1.
    """
    shape = (len(range(shape[0])[rows]), *shape[1:])
    value = torch.randn(shape, generator=random)
    if len(shape) > 1 and not key.endswith("pos_embed"):
        value /= math.sqrt(math.prod(shape[1:]))
    elif key.endswith(("weight", "scale")):
        value = 1 + 0.1 * value
    else:
        value *= 0.1
    return value.half()


def write_random(family: Family, path: Path, seed: int = 0) -> None:
    """A safetensors file of the family with random fp16 weights, written some rows at a time."""
    random = torch.Generator().manual_seed(seed)
    tensors, header, end = list(weights(family.module())), {}, 0
    for weight in tensors:
        start, end = end, end + 2 * weight.count
        header[weight.key] = {"dtype": "F16", "shape": weight.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in tensors:
            step = max(1, CHUNK * weight.shape[0] // weight.count)
            for start in range(0, weight.shape[0], step):
                rows = slice(start, start + step)
                part = random_weight(weight.key, weight.shape, random, rows)
                file.write(part.numpy().tobytes())


UNET = "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel"
FLUX = "comfy.ldm.flux.model:Flux"

SD15 = Family(
    "sd15",
    UNET,
    {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
    },
    "SD15",
)
SDXL = Family(
    "sdxl",
    UNET,
    {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_head_channels": 64,
    },
    "SDXL",
)
SD35_LARGE = Family(
    "sd35",
    "comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
    {
        "input_size": None,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": 38,
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 2432},
        },
        "num_patches": 192 * 192,
        "pos_embed_max_size": 192,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
    },
    "SD3",
)
FLUX_SCHNELL = Family(
    "flux",
    FLUX,
    {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "hidden_size": 3072,
        "num_heads": 24,
        "mlp_ratio": 4.0,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "context_in_dim": 4096,
        "vec_in_dim": 768,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    },
    "FluxSchnell",
)
QWEN_IMAGE = Family(
    "qwen_image",
    "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",
    {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
    "QwenImage",
)
Z_IMAGE = Family(
    "z_image",
    "comfy.ldm.lumina.model:NextDiT",
    {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 3840,
        "cap_feat_dim": 2560,
        "n_layers": 30,
        "qk_norm": True,
        "n_heads": 30,
        "n_kv_heads": 30,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    },
    "ZImage",
)
FLUX2_KLEIN = Family(
    "flux2_klein",
    FLUX,
    {
        "image_model": "flux2",
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "hidden_size": 3072,
        "num_heads": 24,
        "mlp_ratio": 3.0,
        "depth": 5,
        "depth_single_blocks": 20,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "context_in_dim": 7680,
        "vec_in_dim": None,
        "qkv_bias": False,
        "ops_bias": False,
        "guidance_embed": False,
        "global_modulation": True,
        "mlp_silu_act": True,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    },
    "Flux2",
)
FAMILIES = {
    family.name: family
    for family in (SD15, SDXL, SD35_LARGE, FLUX_SCHNELL, QWEN_IMAGE, Z_IMAGE, FLUX2_KLEIN)
}
