"""Means that are taken off a layer's inputs by an earlier bias: found by looking, and exact."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsched_core.formats import get
from qsched_core.formats.base import Packed
from qsched_core.formats.policy import Policy
from qsched_core.rounding import (
    RoundingSettings,
    calibrate_layer,
    calibrate_module,
    choices,
    grid_of,
    quantized,
    rounded_plainly,
)
from qsched_core.rounding.blocks import stages_of
from qsched_core.rounding.folds import Fold, folds_of
from qsched_core.rounding.layer import Calibrated
from qsched_core.rounding.moments import Gathering
from qsched_core.rounding.walk import parameters_in

WIDTH, HEADS = 64, 2


class Stream(nn.Module):
    """One side of a joint block; ``split``: q, k and v are layers of their own."""

    def __init__(self, split=False, leak=False, bias=True):
        super().__init__()
        self.mod = nn.Linear(WIDTH, 6 * WIDTH)
        self.leak = leak
        if split:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def before(self, x, cond):
        self.chunks = self.mod(F.silu(cond)).unsqueeze(1).chunk(6, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + self.chunks[1]) + self.chunks[0]
        if self.leak:
            self.chunks = (*self.chunks[:5], self.chunks[5] + 0.1 * self.chunks[0])
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        return [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]

    def after(self, x, attended):
        x = x + self.chunks[2] * self.proj(attended)
        h = F.layer_norm(x, (WIDTH,)) * (1 + self.chunks[4]) + self.chunks[3]
        return x + self.chunks[5] * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class Joint(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.text, self.image = Stream(**options), Stream(**options)

    def forward(self, text, image, cond):
        both = zip(self.text.before(text, cond), self.image.before(image, cond), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in both)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        n = text.shape[1]
        return self.text.after(text, out[:, :n]), self.image.after(image, out[:, n:])


class Net(nn.Module):
    def __init__(self, depth=1, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Joint(**options) for _ in range(depth))

    def forward(self, text, image, cond):
        for block in self.blocks:
            text, image = block(text, image, cond)
        return text, image


def net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Net(**options).to(dtype).eval().requires_grad_(False)


def given(dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    shapes = ((2, 5, WIDTH), (2, 9, WIDTH), (2, WIDTH))
    return tuple(torch.randn(shape, generator=random).to(dtype) for shape in shapes)


def found(model, kept=(), dtype=torch.float32):
    inputs = given(dtype)
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n not in kept}

    def run():
        model(*inputs)

    stages = stages_of(layers, run)
    return {fold.consumers: fold for fold in folds_of(layers, stages, layers, model.blocks[0], run)}


def short(*names):
    return tuple(f"blocks.0.{name}" for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifts_of_modulations_and_values_of_a_joint_attention_are_found(dtype):
    folds = found(net(dtype), dtype=dtype)
    parts = {
        tuple((name.removeprefix("blocks.0."), start) for name, start in fold.producers): consumers
        for consumers, fold in folds.items()
    }
    assert parts == {
        **{((f"{s}.mod", 0),): short(f"{s}.qkv") for s in ("text", "image")},
        **{((f"{s}.mod", 3 * WIDTH),): short(f"{s}.fc1") for s in ("text", "image")},
        (("text.qkv", 2 * WIDTH), ("image.qkv", 2 * WIDTH)): short("text.proj", "image.proj"),
    }


def test_layers_that_share_their_inputs_share_the_fold():
    folds = found(net(split=True))
    assert short("text.q", "text.k", "text.v") in folds
    values = folds[short("text.proj", "image.proj")].producers
    assert values == (("blocks.0.text.v", 0), ("blocks.0.image.v", 0))


@pytest.mark.parametrize("split", [True, False])
def test_in_full_precision_a_fold_changes_nothing(split):
    model = net(torch.float64, split=split)
    inputs = given(torch.float64)
    expected = model(*inputs)
    folded = copy.deepcopy(model)
    folds = found(model, dtype=torch.float64).values()
    assert len(folds) == 5
    for k, fold in enumerate(folds):
        mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(k)).double()
        stored = {}
        for name, _ in fold.producers:
            layer = folded.get_submodule(name)
            empty = Packed(layer.weight, {}, tuple(layer.weight.shape))
            stored[name] = Calibrated(empty, layer.bias)
        for name, layer in fold.taken_off(stored, mean).items():
            folded.get_submodule(name).bias.copy_(layer.bias)
        for name in fold.consumers:
            layer = folded.get_submodule(name)
            layer.bias += layer.weight @ mean
    for one, other in zip(folded(*inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_fold_where_the_constant_goes_elsewhere_too_or_can_not_be_given_back():
    qkv = short("text.qkv"), short("image.qkv")
    assert all(consumers in found(net()) for consumers in qkv)
    leaking = found(net(leak=True))
    assert not any(consumers in leaking for consumers in qkv) and short("text.fc1") in leaking
    assert not any(consumers in found(net(bias=False)) for consumers in qkv)
    # One of three that share their inputs is not rounded: its bias stays as it is.
    kept = found(net(split=True), kept=short("text.k"))
    assert not any("blocks.0.text.q" in consumers for consumers in kept)
    assert short("image.q", "image.k", "image.v") in kept
    assert short("text.fc1") not in found(net(), kept=short("text.mod"))


def test_a_fold_says_what_it_takes_off():
    packed = get("int8").quantize(torch.randn(6, 4))
    layers = {"a": Calibrated(packed, torch.ones(6)), "b": Calibrated(packed, torch.ones(6))}
    changed = Fold((("a", 2),), ("b",), 2).taken_off(layers, torch.tensor([1.0, 3.0]))
    assert changed.keys() == {"a"}
    assert changed["a"].bias.tolist() == [1, 1, 0, -2, 1, 1]
    assert layers["a"].bias.tolist() == [1] * 6


class States:
    """The same inputs with other noise, as a trajectory's states."""

    batch, device = 2, torch.device("cpu")

    def __init__(self, model):
        random = torch.Generator().manual_seed(3)
        self.model = model
        self.inputs = [torch.randn(16, *x.shape[1:], generator=random) + 2 * x[:1] for x in given()]

    def __len__(self):
        return 16

    def parts(self, size):
        return [slice(a, a + size) for a in range(0, 16, size)]

    def run(self, part):
        self.model(*(x[part] for x in self.inputs))


def test_the_walk_takes_means_off_and_gives_them_back():
    """What the producers' biases lose comes out of the consumers again."""
    model = net(depth=2)
    rounded = calibrate_module(model, States(model), "w4a4", RoundingSettings(rounds=1))
    mod = rounded["blocks.1.image.mod"].bias - model.blocks[1].image.mod.bias
    part = mod.view(6, WIDTH).abs().mean(1)
    assert (part[[0, 3]] > 5 * part[[1, 2, 4, 5]].max()).all()
    value = rounded["blocks.0.text.qkv"].bias - model.blocks[0].text.qkv.bias
    assert not torch.equal(value, torch.zeros_like(value))
    chosen = choices(model, Policy("w4a4"))
    states, errors = States(model), []
    goal = model(*states.inputs)[1]
    for layers in (rounded_plainly(chosen, partial(parameters_in, model)), rounded):
        with quantized(model, layers, chosen):
            errors.append(float((model(*states.inputs)[1] - goal).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_consumer_gives_the_mean_back_even_where_it_is_rounded_plainly(fails):
    torch.manual_seed(0)
    grid, form = grid_of("w4a4"), get("w4a4")
    weight, bias, mean = torch.randn(32, 64), torch.randn(32), torch.full((64,), 3.0)
    x = torch.zeros(50, 64) if fails else torch.randn(50, 64)
    sums = Gathering()
    sums.add(*grid.pair(x, x + mean))
    found = calibrate_layer(grid, weight, bias, sums.moments(), shift=mean)
    assert bool(found.note) == fails
    out, goal = form.linear(x, found.packed, found.bias), F.linear(x + mean, weight, bias)
    error = (out - goal).square().mean() / goal.square().mean()
    assert error < 0.02
