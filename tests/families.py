"""Small random-weight models that ComfyUI (0.30.0) itself takes for a family's members.

Widths are as small as detection allows.  Every weight is random, also those that a fresh model has
at zero (modulation and last layers), so that each of them matters to the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks import _families as real
from benchmarks._families import Family

CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class Small:
    """A small member of a family, and what one sample of it needs.

    ``latent`` is the shape of a batch of one, ``context`` the features of a text token, ``pooled``
    those of the pooled text (None: the family has none), ``extra`` what else it is conditioned on.
    """

    family: Family
    latent: tuple[int, ...]
    context: int
    pooled: int | None = None
    extra: Mapping[str, float | torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.family.name

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp16 state dict, the same every time."""
        random = torch.Generator().manual_seed(0)
        state = self.family.module().state_dict()
        return {key: real.random_weight(key, tuple(v.shape), random) for key, v in state.items()}

    def conditioning(self) -> list:
        """What a text encoder gives the sampler."""
        random = torch.Generator().manual_seed(1)
        options: dict = dict(self.extra)
        if self.pooled is not None:
            options["pooled_output"] = torch.randn(1, self.pooled, generator=random)
        return [[torch.randn(1, CONTEXT_TOKENS, self.context, generator=random), options]]


def _sd3(name: str, depth: int, pos_embed: int, **changes) -> Small:
    context = {"in_features": 4096, "out_features": 64 * depth}
    family = real.SD35_LARGE.smaller(
        name,
        depth=depth,
        num_patches=pos_embed**2,
        pos_embed_max_size=pos_embed,
        context_embedder_config={"target": "torch.nn.Linear", "params": context},
        **changes,
    )
    return Small(family, (1, 16, 12, 12), 4096, 2048)


FLUX_WIDTH = {"hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}

SD15 = Small(
    real.SD15.smaller(
        channel_mult=[1, 1],
        num_res_blocks=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
    ),
    (1, 4, 12, 12),
    768,
)
# The class of SDXL itself starts at 70 transformer blocks; that of KOALA-700M is a subclass of it
# with the same kinds of layers, fewer of them.  Detection reads the input blocks' depth alone.
SDXL = Small(
    real.SDXL.smaller(
        "sdxl_koala",
        "KOALA_700M",
        channel_mult=[1, 1, 1],
        num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 2, 5],
        transformer_depth_output=[0, 0, 0, 0, 0, 1],
        transformer_depth_middle=-1,
    ),
    (1, 4, 16, 16),
    2048,
    1280,
)
SD3 = _sd3("sd3_medium", 4, 32, qk_norm=None)
SD35 = _sd3("sd35", 4, 32)
SD35_MEDIUM = _sd3("sd35_medium", 4, 48, x_block_self_attn_layers=[0, 1])
FLUX_SCHNELL = Small(
    real.FLUX_SCHNELL.smaller("flux_schnell", **FLUX_WIDTH), (1, 16, 12, 12), 4096, 768
)
FLUX_DEV = Small(
    real.FLUX_SCHNELL.smaller("flux_dev", "Flux", guidance_embed=True, **FLUX_WIDTH),
    (1, 16, 12, 12),
    4096,
    768,
    # ComfyUI embeds 1000 * guidance in the compute dtype: 4 is exact in bf16, 3.5 is not, and this
    # model would answer to 3.504 there.
    {"guidance": 4.0},
)
# FLUX.2 klein is the recent few-step DiT whose width detection reads from the file.  Z-Image's
# and Qwen-Image's are fixed: one block of each is 0.18 and 0.34 billion weights.
FLUX2_KLEIN = Small(real.FLUX2_KLEIN.smaller(**FLUX_WIDTH), (1, 128, 8, 8), 7680)
# A video model, for latents with a dimension of frames.
WAN = Small(
    Family(
        "wan",
        "comfy.ldm.wan.model:WanModel",
        {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2},
        "WAN21_T2V",
    ),
    (1, 16, 3, 8, 8),
    4096,
)
# Another, whose latents are of 32 pixels.
LTXV = Small(
    Family(
        "ltxv",
        "comfy.ldm.lightricks.model:LTXVModel",
        {"num_layers": 1, "attention_head_dim": 8, "cross_attention_dim": 256},
        "LTXV",
    ),
    (1, 128, 1, 3, 3),
    4096,
    extra={"attention_mask": torch.ones(1, CONTEXT_TOKENS)},
)
QWEN_IMAGE = Small(real.QWEN_IMAGE.smaller(num_layers=1), (1, 16, 1, 8, 8), 3584)

SMALL = {
    s.name: s for s in (SD15, SDXL, SD3, SD35, SD35_MEDIUM, FLUX_SCHNELL, FLUX_DEV, FLUX2_KLEIN)
}
