"""The demo's text encoder: a CLIP-L whose weights are generated, not trained.

Token and position embeddings are seeded random numbers and every attention and MLP projection is
zero, so each layer is the identity and the hidden state of a token is its embedding plus its
position.  Positions from MAX_TOKENS on are zero, so all pads there are the same vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import open_clip
import torch

from .mmdit import TEXT_TOKENS

VOCABULARY, CONTEXT, WIDTH, LAYERS = 49408, 77, 768, 12
END_OF_TEXT = 49407
MAX_TOKENS = TEXT_TOKENS - 1


@cache
def embedding_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Token [49408, 768] and position [77, 768] embeddings in float16; PCG64 fixes every bit."""
    rng = np.random.Generator(np.random.PCG64(20240901))
    tokens = torch.from_numpy(rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)).half()
    positions = rng.standard_normal((CONTEXT, WIDTH), dtype=np.float32) * 0.7
    positions[MAX_TOKENS:] = 0
    return tokens, torch.from_numpy(positions).half()


@cache
def _tokenizer():
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def tokenize(captions: Sequence[str]) -> torch.Tensor:
    """CLIP token ids [n, 77], padded with the end token as ComfyUI's CLIP-L does."""
    ids = _tokenizer()(list(captions))
    ends = (ids == END_OF_TEXT).int().cumsum(1) > 0
    ids = torch.where(ends, torch.full_like(ids, END_OF_TEXT), ids)
    if not (ids[:, MAX_TOKENS:] == END_OF_TEXT).all():
        longest = max(captions, key=len)
        raise ValueError(f"caption longer than {MAX_TOKENS} tokens: {longest!r}")
    return ids


def context_of(ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [n, 21, 768] of token ids [n, 77]; the last stands for all the pads."""
    tokens, positions = embedding_tables()
    return (tokens[ids[:, :TEXT_TOKENS]].float() + positions[:TEXT_TOKENS].float()).contiguous()


def clip_l_state_dict() -> dict[str, torch.Tensor]:
    """The whole CLIP-L as ComfyUI's checkpoint loader expects it (float16, 246 MB)."""
    tokens, positions = embedding_tables()
    root = "text_encoders.clip_l.transformer.text_model."

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float16)

    state = {
        root + "embeddings.token_embedding.weight": tokens,
        root + "embeddings.position_embedding.weight": positions,
        root + "final_layer_norm.weight": torch.ones(WIDTH, dtype=torch.float16),
        root + "final_layer_norm.bias": zeros(WIDTH),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(WIDTH).half(),
    }
    for index in range(LAYERS):
        layer = f"{root}encoder.layers.{index}."
        for norm in ("layer_norm1", "layer_norm2"):
            state[f"{layer}{norm}.weight"] = torch.ones(WIDTH, dtype=torch.float16)
            state[f"{layer}{norm}.bias"] = zeros(WIDTH)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state[f"{layer}self_attn.{name}.weight"] = zeros(WIDTH, WIDTH)
            state[f"{layer}self_attn.{name}.bias"] = zeros(WIDTH)
        state[layer + "mlp.fc1.weight"] = zeros(4 * WIDTH, WIDTH)
        state[layer + "mlp.fc1.bias"] = zeros(4 * WIDTH)
        state[layer + "mlp.fc2.weight"] = zeros(WIDTH, 4 * WIDTH)
        state[layer + "mlp.fc2.bias"] = zeros(WIDTH)
    return state
