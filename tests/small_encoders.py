"""T5 and its companions as small files of the published keys.

Widths that ComfyUI takes for granted (T5-XXL's 4096, CLIP's 768 and 1280) are the published ones.  The
kind is detected by the last layer's key, which is beside the few layers that are there.
"""

from __future__ import annotations

import torch

LAYERS, HEADS, HEAD, FF = 3, 2, 8, 64
SHORT = "a red circle above a blue ring"
LONG = ", ".join(f"object number {number} of a long list" for number in range(60))
CONFIGS = {
    "t5xxl_model_config": {"num_layers": LAYERS, "num_heads": HEADS, "d_kv": HEAD, "d_ff": FF},
    "model_config": {"num_hidden_layers": LAYERS, "intermediate_size": FF},  # of CLIP-L and CLIP-G
}


def t5() -> dict[str, torch.Tensor]:
    """T5-XXL v1.1's keys: gated feed-forward, one table of relative positions."""
    random, inner = torch.Generator().manual_seed(1), HEADS * HEAD

    def linear(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).half()

    state = {"shared.weight": torch.randn(32128, 4096, generator=random).half()}
    for index in range(LAYERS):
        block = f"encoder.block.{index}.layer"
        for name in "qkv":
            state[f"{block}.0.SelfAttention.{name}.weight"] = linear(inner, 4096)
        state[f"{block}.0.SelfAttention.o.weight"] = linear(4096, inner)
        for name in ("wi_0", "wi_1"):
            state[f"{block}.1.DenseReluDense.{name}.weight"] = linear(FF, 4096)
        state[f"{block}.1.DenseReluDense.wo.weight"] = linear(4096, FF)
        for part in (0, 1):
            state[f"{block}.{part}.layer_norm.weight"] = torch.ones(4096).half()
    bias = torch.randn(32, HEADS, generator=random).half()
    state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    state["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"] = linear(10240, 1)
    return state | {"encoder.final_layer_norm.weight": torch.ones(4096).half()}


def clip(width: int, last: int) -> dict[str, torch.Tensor]:
    """The text tower of CLIP-L (768) or CLIP-G (1280), in the published keys."""
    random, prefix = torch.Generator().manual_seed(width), "text_model"

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).half()

    state = {
        f"{prefix}.embeddings.token_embedding.weight": draw(49408, width),
        f"{prefix}.embeddings.position_embedding.weight": draw(77, width),
        "text_projection.weight": draw(width, width),
    }
    norms = [f"{prefix}.final_layer_norm"]
    for index in sorted({*range(LAYERS), last}):
        layer = f"{prefix}.encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        shapes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, shape in (shapes | {"mlp.fc1": (FF, width), "mlp.fc2": (width, FF)}).items():
            state[f"{layer}.{name}.weight"] = draw(*shape)
            state[f"{layer}.{name}.bias"] = torch.zeros(shape[0]).half()
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.ones(width).half(),
            torch.zeros(width).half(),
        )
    return state


FILES = {"t5": t5, "l": lambda: clip(768, 1), "g": lambda: clip(1280, 30)}
# ComfyUI's name of the type, and the towers
KINDS = {"flux": ("FLUX", ("l", "t5")), "sd3": ("SD3", ("l", "g", "t5")), "t5": ("SD3", ("t5",))}
