"""Calibrated rounding on six model families: tiny members of ComfyUI's own classes, random weights.

Every weight is random, also those that a fresh model has at zero.  Inputs are smooth fields with
noise at four levels; texts and what else conditions the model lie near a few directions, as real
ones do.  ``families.NAME.distance``: squared distance of int3's output to the unquantized output on
unseen inputs, over that output's mean square: calibrated, plain, and the ratio of the two.
``families.distance``: the median of the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsched_core.formats.policy import Policy
from qsched_core.rounding import calibrate_module, choices, quantized, rounded_plainly
from qsched_core.rounding.layer import Calibrated
from qsched_core.rounding.walk import parameters_in

from . import _families as real
from ._common import BenchRow, machine, report
from ._families import Family, random_weight
from ._host import import_pack

LEVELS = (1.0, 0.9, 0.75, 0.5)  # four steps of a flow model at shift 3
TOKENS, DIRECTIONS = 12, 6
CALIBRATION, UNSEEN, BATCH = 64, 32, 16
INT3 = Policy("int3")


@dataclass(frozen=True)
class Tiny:
    """A family's tiny member, and what one input of it is.

    ``latent`` [channels, ...] and ``context``, the features of a text token; ``extra`` are vectors
    [features] by the name of their argument.  ``time`` is the timestep at noise level 1.
    """

    family: Family
    latent: tuple[int, ...]
    context: int
    time: float = 1000.0
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.family.name

    def module(self) -> nn.Module:
        """The model in fp32, with the same random weights every time.  ComfyUI must be importable."""
        path, name = self.family.target.split(":")
        make = getattr(importlib.import_module(path), name)
        operations = importlib.import_module("comfy.ops").disable_weight_init
        module = make(
            **self.family.config, device="cpu", dtype=torch.float32, operations=operations
        )
        random = torch.Generator().manual_seed(0)
        state = {
            key: random_weight(key, tuple(value.shape), random).float()
            for key, value in module.state_dict().items()
        }
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)


class Inputs:
    """Random inputs of a tiny model: ``count`` of them, other ones for each ``seed``."""

    def __init__(self, tiny: Tiny, module: nn.Module, count: int, seed: int):
        self.module, self.batch, self.device = module, BATCH, torch.device("cpu")
        shared = torch.Generator().manual_seed(0)  # what inputs of every seed have in common
        own = torch.Generator().manual_seed(1 + seed)
        channels, *space = tiny.latent
        mix = torch.randn(channels, 4, generator=shared)
        coarse = torch.randn(count, 4, *(max(1, n // 4) for n in space), generator=own)
        how = {2: "bicubic", 3: "trilinear"}[len(space)]
        smooth = nn.functional.interpolate(coarse, size=tuple(space), mode=how)
        smooth = torch.einsum("ck,nk...->nc...", mix, smooth)
        smooth /= smooth.std()
        level = torch.tensor(LEVELS)[torch.randint(len(LEVELS), (count,), generator=own)]
        share = level.view(-1, *[1] * len(tiny.latent))
        noise = torch.randn(smooth.shape, generator=own)
        self.latents, self.times = (1 - share) * smooth + share * noise, level * tiny.time
        self.context = _near_few((count, TOKENS), tiny.context, shared, own)
        self.extra = {k: _near_few((count,), n, shared, own) for k, n in tiny.extra.items()}

    def __len__(self) -> int:
        return len(self.latents)

    def parts(self, size: int) -> list[slice]:
        return [slice(a, min(len(self), a + size)) for a in range(0, len(self), size)]

    @torch.no_grad()
    def run(self, part: slice) -> torch.Tensor:
        """As ComfyUI calls a diffusion model."""
        extra: dict[str, Any] = {key: value[part].clone() for key, value in self.extra.items()}
        return self.module(
            self.latents[part].clone(),
            self.times[part].clone(),
            context=self.context[part].clone(),
            control=None,
            transformer_options={},
            **extra,
        )

    def outputs(self) -> torch.Tensor:
        return torch.cat([self.run(part) for part in self.parts(self.batch)])


def _near_few(
    shape: tuple[int, ...], features: int, shared: torch.Generator, own: torch.Generator
) -> torch.Tensor:
    """[*shape, features] near a few directions that all seeds share, around a mean of each place."""
    directions = torch.randn(DIRECTIONS, features, generator=shared)
    mean = 0.5 * torch.randn(*shape[1:], features, generator=shared)
    where = torch.randn(*shape, DIRECTIONS, generator=own) / DIRECTIONS**0.5
    return mean + where @ directions + 0.1 * torch.randn(*shape, features, generator=own)


UNET = {"model_channels": 64, "num_res_blocks": [1, 1], "context_dim": 64}
SD15 = Tiny(
    real.SD15.smaller(
        **UNET,
        channel_mult=[1, 2],
        num_heads=4,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
    ),
    (4, 16, 16),
    64,
)
SDXL = Tiny(
    real.SDXL.smaller(
        **UNET,
        channel_mult=[1, 2],
        num_head_channels=32,
        adm_in_channels=64,
        transformer_depth=[0, 2],
        transformer_depth_output=[0, 0, 2, 2],
        transformer_depth_middle=2,
    ),
    (4, 16, 16),
    64,
    extra={"y": 64},
)
SD35 = Tiny(
    real.SD35_LARGE.smaller(
        depth=2,
        adm_in_channels=64,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 64, "out_features": 128},
        },
        num_patches=16 * 16,
        pos_embed_max_size=16,
    ),
    (16, 12, 12),
    64,
    extra={"y": 64},
)
FLUX = Tiny(
    real.FLUX_SCHNELL.smaller(
        hidden_size=128,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 24, 24],
        context_in_dim=64,
        vec_in_dim=64,
    ),
    (16, 12, 12),
    64,
    time=1.0,
    extra={"y": 64},
)
WAN = Tiny(
    Family(
        "wan",
        "comfy.ldm.wan.model:WanModel",
        {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 64},
        "WAN21_T2V",
    ),
    (16, 3, 8, 8),
    64,
)
QWEN_IMAGE = Tiny(
    real.QWEN_IMAGE.smaller(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(16, 24, 24),
    ),
    (16, 1, 12, 12),
    64,
    time=1.0,
)
TINY = {tiny.name: tiny for tiny in (SD15, SDXL, SD35, FLUX, WAN, QWEN_IMAGE)}


@dataclass(frozen=True)
class Outcome:
    """Distances of the output to the unquantized one on unseen inputs, and the rounded layers."""

    module: nn.Module
    plain: float
    calibrated: float
    layers: Mapping[str, Calibrated]

    @property
    def ratio(self) -> float:
        return self.calibrated / self.plain


def outcome(tiny: Tiny, policy: Policy = INT3) -> Outcome:
    module = tiny.module()
    chosen = choices(module, policy)
    layers = calibrate_module(module, Inputs(tiny, module, CALIBRATION, 0), policy)
    plain = rounded_plainly(chosen, lambda name: parameters_in(module, name))
    unseen = Inputs(tiny, module, UNSEEN, 1)
    wanted, found = unseen.outputs(), []
    for rounded in (plain, layers):
        with quantized(module, rounded, chosen):
            left = unseen.outputs() - wanted
        found.append(float(left.square().mean() / wanted.square().mean()))
    return Outcome(module, *found, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", nargs="+", choices=tuple(TINY), default=tuple(TINY))
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_pack()
    rows = []
    for name in options.only:
        found = outcome(TINY[name])
        notes = [layer.note for layer in found.layers.values() if layer.note]
        what = f"int3: output distance, calibrated and plain; {len(found.layers)} layers"
        if notes:
            what += f", {len(notes)} of them rounded plainly ({', '.join(sorted(set(notes)))})"
        rows.append(
            BenchRow(f"families.{name}.distance", what, found.calibrated, found.plain, found.ratio,
                     "", UNSEEN, machine(), "<= 1")
        )  # fmt: skip
        report(rows, options.json)
    median = statistics.median(row.ratio for row in rows)
    rows.append(
        BenchRow("families.distance", f"median ratio of {', '.join(options.only)}", median, 1.0, median,
                 "", len(rows), machine(), "<= 0.5")
    )  # fmt: skip
    report(rows, options.json)


if __name__ == "__main__":
    main()
