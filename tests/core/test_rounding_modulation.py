"""Modulation layers: which format they get when they are calibrated, and when they are not."""

from __future__ import annotations

import pytest
import rounding_task
import torch
from rounding_cases import PROMPTS
from torch import nn

from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.rounding import TaskSubject, calibrate_weights, choices
from qsched_core.rounding.proof import Proof

WIDTH = rounding_task.WIDTH
INT2 = Policy("int2", parse_overrides("first=keep"))


class Block(rounding_task.Block):
    """Its modulation gets few distinct inputs, as one of noise level and prompt does."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.register_buffer("few", torch.randn(3, WIDTH))

    def forward(self, x, cond):
        shift, scale = self.modulation(torch.tanh(cond[..., :3] @ self.few)).chunk(2, -1)
        return super().forward(x * (1 + scale) + shift, cond)


class Net(rounding_task.Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shared = nn.Module()
        self.shared.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, sigma, cond):
        return super().forward(x, sigma, cond + 0.1 * self.shared.modulation(cond))


def net():
    torch.manual_seed(3)
    model = Net().eval().requires_grad_(False)
    model.load_state_dict(rounding_task.net().state_dict(), strict=False)
    return model


def formats(policy, **options):
    chosen = choices(net(), policy, **options)
    assert all(chosen[name].weight_only for name in chosen if "modulation" in name)
    return [chosen[n].format for n in ("blocks.1.modulation", "shared.modulation", "blocks.1.q")]


def test_inside_blocks_it_is_the_base_format_and_the_plain_rule_holds_elsewhere():
    assert formats(INT2) == ["int2", "nf4", "int2"]
    assert formats(INT2, calibrated=False) == ["nf4", "nf4", "int2"]
    assert formats(Policy("w4a8")) == ["w4a8", "w4a8", "w4a8"]
    assert formats(Policy("int2", modulation="int3")) == ["int3", "int3", "int2"]
    assert formats(Policy("int2", parse_overrides("*modulation=int8"))) == ["int8", "int8", "int2"]


def test_a_policy_names_every_format_and_refuses_an_unknown_one():
    assert Policy("int2", modulation="int3").formats() == ("int2", "int3")
    assert Policy("int2").formats() == ("int2", "nf4")
    with pytest.raises(FormatError, match="int5"):
        Policy("int2", modulation="int5")


def test_it_takes_fewer_bits_than_plain_rounding_and_comes_nearer(tmp_path):
    inside = Policy("int2", parse_overrides("first|shared*=keep"))
    result = calibrate_weights(TaskSubject(rounding_task.task(net())), PROMPTS, inside, tmp_path)
    assert result.calibrated and result.proof.calibrated.mean < 0.8 * result.proof.plain.mean
    assert result.bits < 0.9 * result.plain_bits
    layer = result.weights.layers["blocks.2.modulation"]
    assert layer.packed.bits < 3 and layer.error < 0.3 * layer.plain_error


def test_what_is_kept_without_a_gain_is_what_plain_rounding_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(Proof, "holds", False)
    result = calibrate_weights(
        TaskSubject(rounding_task.task(net())), PROMPTS, Policy("int2"), tmp_path
    )
    assert not result.calibrated and result.bits == pytest.approx(result.plain_bits)
    weights = result.weights
    assert weights.chosen["blocks.0.modulation"].format == "nf4"
    assert weights.layers["blocks.0.modulation"].packed.bits > 4
