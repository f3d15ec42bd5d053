"""Convolutions are rounded for their unfolded inputs, in a small UNet with skips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from qsched_core.formats import get
from qsched_core.formats.module import QuantizedConv2d, quantize_module
from qsched_core.formats.policy import Choice, Policy, parse_overrides
from qsched_core.rounding import (
    Gathering,
    RoundedWeights,
    RoundingSettings,
    calibrate_layer,
    calibrate_module,
    choices,
    grid_of,
    quantized,
)
from qsched_core.rounding.layers import count_of, rows_of

CHANNELS, SIDE = 32, 8
INT2 = Policy("int2", parse_overrides("first=keep"), min_weights=1)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.one_of(
        st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))
    ),
)
def test_a_convolution_is_its_matrix_times_the_unfolded_rows(kernel, stride, dilation, padding):
    assume(padding != "same" or stride == 1)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation).double()
    conv = conv.float()
    x = torch.randn(2, 3, 7, 6)
    rows = list(rows_of(conv, x))
    found = torch.stack([r @ conv.weight.flatten(1).t() + conv.bias for r in rows])
    wanted = conv(x)
    assert count_of(conv, x) == sum(len(r) for r in rows)
    torch.testing.assert_close(
        found.transpose(1, 2).unflatten(2, wanted.shape[2:]), wanted, rtol=1e-4, atol=1e-5
    )


class Down(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.emb = nn.Linear(16, CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1, groups=groups)

    def forward(self, x, cond):
        h = F.silu(self.conv1(x)) + self.emb(cond)[..., None, None]
        return F.silu(self.conv2(h))


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding="same", dilation=2, bias=False)
        self.skip = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x, skip):
        h = torch.cat([F.interpolate(x, scale_factor=2), skip], 1)
        return self.skip(h) + torch.tanh(self.conv(h))


class UNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.first = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.input_blocks = nn.ModuleList([Down(groups), Down()])
        self.output_blocks = nn.ModuleList([Up(), Up()])

    def forward(self, x, cond):
        x = torch.tanh(self.first(x))
        seen = []
        for block in self.input_blocks:
            seen.append(x)
            x = block(x, cond)
        for block in self.output_blocks:
            x = block(x, seen.pop())
        return x


def net(groups=1):
    """Its channels are correlated, as a trained network's are."""
    torch.manual_seed(1)
    model = UNet(groups).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            matrix = layer.weight.flatten(1)
            mix = torch.logspace(0, -1.5, len(matrix)).unsqueeze(1)
            left = torch.linalg.qr(torch.randn(len(matrix), len(matrix))).Q
            layer.weight.copy_((left @ (mix * matrix) * 3).view_as(layer.weight))
    return model


class States:
    batch, device = 4, torch.device("cpu")

    def __init__(self, model, seed=0, count=24):
        random = torch.Generator().manual_seed(seed)
        self.model = model
        self.x = torch.randn(count, 4, SIDE, SIDE, generator=random)
        self.cond = torch.randn(count, 16, generator=random)

    def __len__(self):
        return len(self.x)

    def parts(self, size):
        return [slice(a, a + size) for a in range(0, len(self), size)]

    def run(self, part):
        return self.model(self.x[part], self.cond[part])


def error(model, goal, states):
    return float((states.run(slice(None)) - goal).square().mean() / goal.square().mean())


@pytest.mark.parametrize("name", ["int2", "nf4", "w4a8", "svdquant_w4a4"])
def test_the_unet_errs_less_on_inputs_that_it_never_saw(name):
    model = net()
    policy = Policy(name, parse_overrides("first=keep"), min_weights=1)
    found = calibrate_module(model, States(model), policy)
    chosen = choices(model, policy)
    convolutions = [n for n in chosen if isinstance(model.get_submodule(n), nn.Conv2d)]
    assert len(convolutions) == (8 if name != "svdquant_w4a4" else 4) and not [
        n for n in convolutions if found[n].note
    ]
    unseen = States(model, seed=7)
    goal = unseen.run(slice(None))
    with quantized(model, found, chosen):
        after = error(model, goal, unseen)
    quantize_module(model, policy)
    before = error(model, goal, unseen)
    assert after < 0.6 * before


def test_convolutions_of_grouped_channels_are_rounded_plainly_with_the_reason():
    model = net(groups=4)
    found = calibrate_module(model, States(model), INT2, RoundingSettings(rounds=0))
    notes = {name: layer.note for name, layer in found.items() if layer.note}
    assert list(notes) == ["input_blocks.0.conv2"] and "groups" in notes["input_blocks.0.conv2"]


def test_the_packing_of_a_convolution_keeps_its_shape_and_its_file(tmp_path):
    model = net()
    found = calibrate_module(model, States(model), INT2, RoundingSettings(rounds=0))
    layer = model.output_blocks[0].conv
    packed = found["output_blocks.0.conv"].packed
    assert packed.shape == tuple(layer.weight.shape)
    plain = get("int2").quantize(layer.weight)
    assert packed.codes.shape == plain.codes.shape and packed.nbytes == plain.nbytes
    weights = RoundedWeights(found, choices(model, INT2))
    weights = RoundedWeights.load(weights.save(tmp_path / "unet.safetensors"))
    states = States(model, seed=3)
    with quantized(model, found, choices(model, INT2)):
        wanted = states.run(slice(None))
    weights.apply(model)
    assert isinstance(model.output_blocks[0].conv, QuantizedConv2d)
    assert torch.equal(states.run(slice(None)), wanted)


def test_a_convolution_never_rounds_its_inputs():
    """Its statistics are of what it gets, and its target takes up earlier errors."""
    conv = nn.Conv2d(8, 32, 3, padding=1).requires_grad_(False)
    x = torch.randn(20, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    grid, sums = grid_of("w4a8", weight_only=True), Gathering()
    for q, fp in zip(rows_of(conv, 0.8 * x), rows_of(conv, x), strict=True):
        sums.add(*grid.pair(q, fp))
    found = calibrate_layer(grid, conv.weight, conv.bias, sums.moments())
    made = QuantizedConv2d(conv, found.packed, Choice("w4a8"), found.bias)
    wanted = conv(x)
    before = (conv(0.8 * x) - wanted).square().mean()
    assert (made(0.8 * x) - wanted).square().mean() < 0.2 * before
