"""Plain-torch twin of ComfyUI's SD3 MMDiT (arXiv 2403.03206), for training the demo's generator.

Parameter names and arithmetic are those of ``comfy/ldm/modules/diffusionmodules/mmdit.py``, so the
trained state dict loads there under ``model.diffusion_model.`` (see ``build.py``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 64
TEXT_TOKENS = 21  # the tokens a caption can use, and one that stands for all identical pads
PAD_COPIES = 57  # 77 - 20: how many pads the last token stands for


def _sincos_1d(dim: int, positions: torch.Tensor) -> torch.Tensor:
    omega = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32) / (dim / 2))
    angles = positions.reshape(-1, 1) * omega
    return torch.cat([angles.sin(), angles.cos()], 1)


def timestep_embedding(t: torch.Tensor, dim: int = 256) -> torch.Tensor:
    half = dim // 2
    freqs = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class _SelfAttention(nn.Module):
    def __init__(self, hidden: int, pre_only: bool):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        if not pre_only:
            self.proj = nn.Linear(hidden, hidden)
        self.ln_q = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.ln_k = nn.RMSNorm(HEAD_DIM, eps=1e-6)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, -1, HEAD_DIM).unbind(2)
        return self.ln_q(q.float()).to(v.dtype), self.ln_k(k.float()).to(v.dtype), v


class _Mlp(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _DismantledBlock(nn.Module):
    def __init__(self, hidden: int, pre_only: bool):
        super().__init__()
        self.pre_only = pre_only
        self.attn = _SelfAttention(hidden, pre_only)
        if not pre_only:
            self.mlp = _Mlp(hidden)
        chunks = 2 if pre_only else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, chunks * hidden))

    def norm(self, x):
        return F.layer_norm(x, (x.shape[-1],), eps=1e-6)

    def before_attention(self, x, cond):
        chunks = self.adaLN_modulation(cond).chunk(2 if self.pre_only else 6, 1)
        return self.attn(modulate(self.norm(x), chunks[0], chunks[1])), chunks

    def after_attention(self, attended, x, chunks):
        x = x + chunks[2].unsqueeze(1) * self.attn.proj(attended)
        mlp = self.mlp(modulate(self.norm(x), chunks[3], chunks[4]))
        return x + chunks[5].unsqueeze(1) * mlp


class _JointBlock(nn.Module):
    def __init__(self, hidden: int, pre_only: bool):
        super().__init__()
        self.context_block = _DismantledBlock(hidden, pre_only)
        self.x_block = _DismantledBlock(hidden, False)

    def forward(self, context, x, cond, mask):
        context_qkv, context_mod = self.context_block.before_attention(context, cond)
        x_qkv, x_mod = self.x_block.before_attention(x, cond)
        q, k, v = (
            torch.cat(pair, 1).transpose(1, 2) for pair in zip(context_qkv, x_qkv, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        out = out.transpose(1, 2).flatten(2)
        n = context.shape[1]
        if self.context_block.pre_only:
            context = None
        else:
            context = self.context_block.after_attention(out[:, :n], context, context_mod)
        return context, self.x_block.after_attention(out[:, n:], x, x_mod)


class _FinalLayer(nn.Module):
    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond).chunk(2, 1)
        x = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
        return self.linear(modulate(x, shift, scale))


class MMDiT(nn.Module):
    """Flow-matching velocity model: (x [n, 16, h, w], sigma [n] in (0, 1], context [n, 21, 768])."""

    def __init__(self, depth: int = 4, patch: int = 2, channels: int = 16, grid: int = 16):
        super().__init__()
        hidden = HEAD_DIM * depth
        self.patch, self.channels, self.grid = patch, channels, grid
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, hidden, patch, stride=patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.context_embedder = nn.Linear(768, hidden)
        axis = torch.arange(grid).float()
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        table = torch.cat([_sincos_1d(hidden // 2, x), _sincos_1d(hidden // 2, y)], 1)
        self.register_buffer("pos_embed", table[None])
        self.joint_blocks = nn.ModuleList(
            _JointBlock(hidden, pre_only=i == depth - 1) for i in range(depth)
        )
        self.final_layer = _FinalLayer(hidden, patch * patch * channels)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, param in self.named_parameters():
            if "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(param)
            elif name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(param, std=0.02)

    def forward(self, x, sigma, context):
        n, _, height, width = x.shape
        p, g = self.patch, self.grid
        h, w = height // p, width // p
        top, left = (g - h) // 2, (g - w) // 2
        table = self.pos_embed.view(g, g, -1)[top : top + h, left : left + w]
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + table.reshape(1, h * w, -1)
        cond = self.t_embedder.mlp(timestep_embedding(sigma * 1000).to(x.dtype))
        context = self.context_embedder(context)
        mask = torch.zeros(1, 1, 1, TEXT_TOKENS + h * w, device=x.device)
        mask[..., TEXT_TOKENS - 1] = math.log(PAD_COPIES)
        mask = mask.expand(1, 1, TEXT_TOKENS + h * w, -1)
        for block in self.joint_blocks:
            context, x = block(context, x, cond, mask)
        x = self.final_layer(x, cond).reshape(n, h, w, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, self.channels, height, width)
