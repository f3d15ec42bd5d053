"""What counts as a block, and as a linear layer, in models that are built in other ways."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qsched_core.formats.policy import Policy
from qsched_core.rounding import RoundingError, choices
from qsched_core.rounding.blocks import blocks_of

WIDTH = 8


class Cast(nn.Linear):
    """A loader's own kind of linear layer."""


class Net(nn.Module):
    """Sequences that run item by item, as a UNet's do, and one that runs as a whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(Cast(WIDTH, WIDTH), nn.SiLU())
        self.down = nn.ModuleList(nn.Sequential(Cast(WIDTH, WIDTH), nn.SiLU()) for _ in range(2))
        self.middle = nn.Sequential(Cast(WIDTH, WIDTH), nn.Tanh())
        self.up = nn.ModuleList([nn.Sequential(Cast(WIDTH, WIDTH), nn.SiLU()), nn.Identity()])
        self.unused = nn.Sequential(Cast(WIDTH, WIDTH))

    def forward(self, x):
        x, skips = self.embed(x), []
        for sequence in [*self.down, self.middle]:
            for layer in sequence:
                x = layer(x)
            skips.append(x)
        return self.up[0](x + skips[0])


def names(model: nn.Module, layers=()) -> dict[str, int]:
    x = torch.randn(1, 3, WIDTH)
    found = blocks_of(model, lambda: model(x), layers)
    return {block.name: block.last_use for block in found}


@torch.no_grad()
def test_items_of_a_sequence_that_does_not_run_as_a_whole_are_blocks():
    torch.manual_seed(0)
    assert names(Net()) == {
        "down.0.0": 1,
        "down.0.1": 6,  # its output is the skip
        "down.1.0": 3,
        "down.1.1": 4,
        "middle.0": 5,
        "middle.1": 6,
        "up.0": 6,
    }


@torch.no_grad()
def test_lists_inside_of_a_block_are_the_blocks_own():
    inner = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = inner

        def forward(self, x):
            return self.layers[0](x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Module()
            self.body.blocks = nn.ModuleList([Block()])

        def forward(self, x):
            return self.body.blocks[0](x)

    assert names(Outer()) == {"body.blocks.0": 0}


@torch.no_grad()
def test_a_model_without_lists_has_no_blocks():
    with pytest.raises(RoundingError, match="no blocks"):
        names(nn.Sequential(nn.Linear(WIDTH, WIDTH)))


@dataclass(frozen=True)
class Shift:
    """What a model hands its blocks in an object of its own."""

    value: torch.Tensor


class Shared(nn.Module):
    """One layer for all blocks, whose output comes in a dataclass or in an ordinary object."""

    def __init__(self, opaque: bool):
        super().__init__()
        self.opaque = opaque
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(_Shifted() for _ in range(3))

    def forward(self, x):
        shift = Shift(self.modulation(x[:, 0]))
        x = self.again(self.again(x))
        for block in self.blocks:
            x = block(x, (lambda: shift.value) if self.opaque else (shift,))
        return x


class _Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, given):
        shift = given() if callable(given) else given[0].value
        return self.layer(x) + shift.unsqueeze(1)


@torch.no_grad()
@pytest.mark.parametrize("opaque", [False, True])
def test_a_layer_that_all_blocks_share_is_a_block_and_is_kept_for_them(opaque):
    torch.manual_seed(0)
    model = Shared(opaque)
    assert names(model, ["modulation", "again", "blocks.0.layer"]) == {
        "modulation": 3,
        "blocks.0": 2,
        "blocks.1": 3,
        "blocks.2": 3,
    }
    assert names(model) == {"blocks.0": 1, "blocks.1": 2, "blocks.2": 2}


def test_a_kind_of_linear_layer_is_one_unless_its_forward_never_runs():
    model = nn.ModuleDict({"cast": Cast(64, 64), "attention": nn.MultiheadAttention(64, 2)})
    assert list(choices(model, Policy("int2", min_weights=1))) == ["cast"]
