"""A tiny plain-torch task with blocks, a skip connection and a layer outside, for calibrated rounding."""

from __future__ import annotations

import torch
from torch import nn

from qsched_core.task import Task

WIDTH, SIDE = 64, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, cond):
        h = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x + cond))
        return x + self.proj(h), {"gate": h.mean(1)}


class Net(nn.Module):
    """Three blocks; what the first one gives is used again by the third, as a UNet's skips are."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, sigma, cond):
        self.first(cond[:0])  # a layer that all share and that runs twice: no block of its own
        x = torch.nn.functional.silu(self.first(x))
        seen = []
        for k, block in enumerate(self.blocks):
            if k == 2:
                x = x + 0.5 * seen.pop(0)
            x, gate = block(x, cond.unsqueeze(1) * sigma.view(-1, 1, 1))
            x += 0.1 * gate["gate"].unsqueeze(1)  # in place: what a block gave is written to
            seen.append(x)
        return x


def net() -> Net:
    """Its hidden channels are correlated, as a trained network's are."""
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        for layer in [made.first, *(m for b in made.blocks for m in (b.q, b.k, b.proj))]:
            left, _, right = torch.linalg.svd(layer.weight)
            layer.weight.copy_(4 * left @ torch.diag(torch.logspace(0, -2, WIDTH)) @ right)
    return made


def task(model: nn.Module | None = None, **more) -> Task:
    model = net() if model is None else model

    def denoise(x, sigma, cond):
        return x - sigma.view(-1, 1, 1) * 0.3 * model(x, sigma, cond)

    def initial(seeds):
        return torch.stack(
            [torch.randn(SIDE, WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )

    def condition(prompts):
        seeds = [sum(p.encode()) for p in prompts]
        return {"cond": initial(seeds)[:, 0]}

    return Task(
        denoise,
        initial,
        condition,
        lambda latents: latents[:, None, :, :3].expand(-1, SIDE, -1, -1).sigmoid(),
        **{
            "sigmas": (1.0, 0.6, 0.0),
            "width": SIDE,
            "height": SIDE,
            "provenance": {"model": "tiny"},
            "max_batch": 8,
            "module": model,
        }
        | more,
    )


def full(device):
    return task()


def without_module(device):
    return task(module=None)
