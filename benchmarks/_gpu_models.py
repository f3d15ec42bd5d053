"""Random models of FLUX's, SD3.5's and SDXL's shapes in plain torch, for GPUs without ComfyUI.

Widths, depths and layer shapes are the published ones (``_shapes`` has them from ComfyUI's modules);
the arithmetic between the layers is what costs the same time, without what only a trained model
needs.  Made on the meta device; ``fill`` gives them weights, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

HEAD = 64


def attention(q, k, v, heads: int) -> torch.Tensor:
    """[n, tokens, width] each, to the same."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def norm(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Modulation(nn.Module):
    def __init__(self, width: int, parts: int):
        super().__init__()
        self.lin, self.parts = nn.Linear(width, parts * width), parts

    def forward(self, vec):
        return self.lin(functional.silu(vec)).unsqueeze(1).chunk(self.parts, -1)


class Stream(nn.Module):
    """One of the two streams of a double (joint) block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.modulation = heads, Modulation(width, 6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def before(self, x, parts):
        q, k, v = self.qkv(norm(x) * (1 + parts[1]) + parts[0]).chunk(3, -1)
        return qk_norm(q, self.heads), qk_norm(k, self.heads), v

    def after(self, x, attended, parts):
        x = x + parts[2] * self.proj(attended)
        hidden = functional.gelu(self.fc1(norm(x) * (1 + parts[4]) + parts[3]), approximate="tanh")
        return x + parts[5] * self.fc2(hidden)


def qk_norm(x: torch.Tensor, heads: int) -> torch.Tensor:
    split = x.unflatten(2, (heads, -1))
    return functional.rms_norm(split, split.shape[-1:]).flatten(2)


class DoubleBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img, self.txt = Stream(width, heads), Stream(width, heads)
        self.heads = heads

    def forward(self, img, txt, vec):
        streams = (self.txt, self.img)
        parts = [stream.modulation(vec) for stream in streams]
        pairs = [s.before(x, p) for s, x, p in zip(streams, (txt, img), parts, strict=True)]
        q, k, v = (torch.cat(pair, 1) for pair in zip(*pairs, strict=True))
        out, n = attention(q, k, v, self.heads), txt.shape[1]
        txt = streams[0].after(txt, out[:, :n], parts[0])
        return streams[1].after(img, out[:, n:], parts[1]), txt


class SingleBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads, self.modulation = width, heads, Modulation(width, 3)
        self.linear1, self.linear2 = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)

    def forward(self, x, vec):
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(norm(x) * (1 + scale) + shift).split(
            [3 * self.width, 4 * self.width], -1
        )
        q, k, v = qkv.chunk(3, -1)
        out = attention(qk_norm(q, self.heads), qk_norm(k, self.heads), v, self.heads)
        return x + gate * self.linear2(
            torch.cat([out, functional.gelu(mlp, approximate="tanh")], -1)
        )


class Transformer(nn.Module):
    """FLUX (double and single blocks) or SD3.5 (double blocks alone); x, text and vec are embedded."""

    def __init__(self, width: int, heads: int, doubles: int, singles: int):
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(doubles))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(singles))

    def forward(self, img, txt, vec):
        for block in self.double_blocks:
            img, txt = block(img, txt, vec)
        x, n = torch.cat([txt, img], 1), txt.shape[1]
        for block in self.single_blocks:
            x = block(x, vec)
        return x[:, n:]


class ResBlock(nn.Module):
    def __init__(self, inside: int, out: int, embedding: int):
        super().__init__()
        self.in_conv, self.out_conv = nn.Conv2d(inside, out, 3, 1, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.skip = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x, vec):
        hidden = self.in_conv(functional.silu(functional.group_norm(x, 32)))
        hidden = hidden + self.emb_layers(vec)[:, :, None, None]
        return self.skip(x) + self.out_conv(functional.silu(functional.group_norm(hidden, 32)))


class CrossBlock(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.heads = width // HEAD
        for name, inside in (("attn1", width), ("attn2", context)):
            made = [nn.Linear(width, width, bias=False), *(
                nn.Linear(inside, width, bias=False) for _ in range(2)
            ), nn.Linear(width, width)]  # fmt: skip
            setattr(self, name, nn.ModuleList(made))
        self.ff1, self.ff2 = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x, context):
        for layers, other in ((self.attn1, None), (self.attn2, context)):
            seen = norm(x)
            q, k, v, out = layers
            source = seen if other is None else other
            x = x + out(attention(q(seen), k(source), v(source), self.heads))
        value, gate = self.ff1(norm(x)).chunk(2, -1)
        return x + self.ff2(value * functional.gelu(gate))


class Spatial(nn.Module):
    def __init__(self, width: int, context: int, depth: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(CrossBlock(width, context) for _ in range(depth))

    def forward(self, x, context):
        tokens = self.proj_in(functional.group_norm(x, 32).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).view(x.shape)


class Level(nn.Module):
    """A residual block and, where ``depth`` is not 0, a spatial transformer."""

    def __init__(self, inside: int, out: int, embedding: int, context: int, depth: int):
        super().__init__()
        self.res = ResBlock(inside, out, embedding)
        self.spatial = Spatial(out, context, depth) if depth else None

    def forward(self, x, context, vec):
        x = self.res(x, vec)
        return x if self.spatial is None else self.spatial(x, context)


class Resample(nn.Module):
    """Half or twice the side, by a convolution."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.op, self.up = nn.Conv2d(width, width, 3, 1 if up else 2, 1), up

    def forward(self, x, context, vec):
        return self.op(functional.interpolate(x, scale_factor=2.0) if self.up else x)


class UNet(nn.Module):
    """SDXL's: three levels of two blocks down and three up, skips between them."""

    def __init__(self, channels: int, context: int, depths: tuple[int, ...]):
        super().__init__()
        widths, embedding = [channels * 2**k for k in range(len(depths))], 4 * channels
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [channels]
        before = channels
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(2):
                self.down.append(Level(before, width, embedding, context, depth))
                skips.append(before := width)
            if k + 1 < len(widths):
                self.down.append(Resample(width, False))
                skips.append(width)
        self.middle = Level(before, before, embedding, context, depths[-1])
        self.last = ResBlock(before, before, embedding)
        for k, (width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            for _ in range(3):
                self.up.append(Level(before + skips.pop(), width, embedding, context, depth))
                before = width
            if k:
                self.up.append(Resample(width, True))

    def forward(self, x, context, vec):
        kept = [x]
        for layer in self.down:
            x = layer(x, context, vec)
            kept.append(x)
        x = self.last(self.middle(x, context, vec), vec)
        for layer in self.up:
            if isinstance(layer, Level):
                x = torch.cat([x, kept.pop()], 1)
            x = layer(x, context, vec)
        return x


@dataclass(frozen=True)
class Shape:
    """A family: ``make(share)`` its model with about that share of the depth, and its inputs.

    ``inputs`` are the shapes for 1024 times 1024 pixels; ``weights`` billions of them at full depth.
    """

    name: str
    make: Callable[[float], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    weights: float


def _part(count: int, share: float) -> int:
    return max(1, round(count * share))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "flux",
            lambda share: Transformer(3072, 24, _part(19, share), _part(38, share)),
            ((1, 4096, 3072), (1, 512, 3072), (1, 3072)),
            11.8,
        ),
        Shape(
            "sd35",
            lambda share: Transformer(2432, 38, _part(38, share), 0),
            ((2, 4096, 2432), (2, 154, 2432), (2, 2432)),
            8.0,
        ),
        Shape(
            "sdxl",
            lambda share: UNet(320, 2048, (0, _part(2, share), _part(10, share))),
            ((2, 320, 128, 128), (2, 77, 2048), (2, 1280)),
            2.5,
        ),
    )
}
TINY = {
    shape.name: shape
    for shape in (
        Shape("flux", lambda share: Transformer(128, 2, 1, 1), ((1, 16, 128), (1, 4, 128), (1, 128)), 0.001),
        Shape("sd35", lambda share: Transformer(128, 2, 2, 0), ((2, 16, 128), (2, 4, 128), (2, 128)), 0.001),
        Shape("sdxl", lambda share: UNet(64, 64, (0, 1, 1)), ((2, 64, 16, 16), (2, 4, 64), (2, 256)), 0.004),
    )
}  # fmt: skip


def random_weight(shape: torch.Size, device, dtype, random: torch.Generator) -> torch.Tensor:
    """Values that keep the variance of a layer's input."""
    value = torch.randn(shape, generator=random, device=device, dtype=dtype)
    return value.mul_(1 / math.sqrt(math.prod(shape[1:])))


def inputs(shape: Shape, device, dtype, batch: int = 1) -> list[torch.Tensor]:
    random = torch.Generator(device).manual_seed(1)
    return [
        torch.randn((batch * s[0], *s[1:]), generator=random, device=device, dtype=dtype)
        for s in shape.inputs
    ]


def replace(model: nn.Module, new: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Every linear layer and convolution of ``model`` by ``new(name, layer)``; the same model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new(name, layer))
    return model
