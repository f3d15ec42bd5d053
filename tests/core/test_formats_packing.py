"""Packing and packing again in the formats on comfy-kitchen's kernels: any weight, little changed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from kitchen_cases import ALL, BOUNDS, gaussian, relative, same, same_bits
from torch import nn

from qsched_core import formats
from qsched_core.formats import FormatError, base, blocks
from qsched_core.formats.kitchen import unpack_int4
from qsched_core.formats.module import quantize_module

pytest.importorskip("comfy_kitchen.tensor")


@ALL
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_of_any_size_round_trip(name, scale):
    form, weight = formats.get(name), (gaussian(64, 128) + 0.5) * scale
    packed = form.quantize(weight)
    assert relative(form.dequantize(packed), weight) < 0.2
    x = gaussian(40, 128, seed=1)
    assert relative(form.linear(x, packed), x @ weight.T) < 0.25


@ALL
def test_zero_and_constant_weights(name):
    form = formats.get(name)
    zeros = torch.zeros(64, 128)
    assert torch.equal(form.dequantize(form.quantize(zeros)), zeros)
    assert torch.equal(form.linear(gaussian(8, 128), form.quantize(zeros)), torch.zeros(8, 64))
    constant = torch.full((64, 128), 0.37)
    assert relative(form.dequantize(form.quantize(constant)), constant) < 0.07


@ALL
def test_tokens_of_zeros_give_the_bias(name):
    form, bias = formats.get(name), gaussian(64)
    x = gaussian(6, 128, seed=1)
    x[2] = 0
    assert torch.allclose(form.linear(x, form.quantize(gaussian(64, 128)), bias)[2], bias)


@ALL
def test_chunks_change_nothing(name, monkeypatch):
    weight = gaussian(320, 128)
    whole = formats.get(name).quantize(weight, measure=True)
    # Some formats' chunks are 128 rows at least.
    for module in (base, blocks, sys.modules["qsched_core.formats.svdquant_w4a4"]):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 128 * 7)
    parts = formats.get(name).quantize(weight, measure=True)
    if name == "svdquant_w4a4":  # its branch sums over the chunks: equal but for fp32 rounding
        assert parts.error == pytest.approx(whole.error, rel=1e-3)
        assert (
            relative(formats.get(name).dequantize(parts), formats.get(name).dequantize(whole))
            < 0.02
        )
    else:
        assert same(parts, whole)
        assert parts.error == pytest.approx(whole.error, rel=1e-6)


@ALL
def test_requantizing_keeps_what_did_not_change(name):
    """Baking a LoRA that touches a few rows leaves the others bit-identical."""
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 128))
    weight = form.dequantize(packed)
    assert same_bits(form.quantize(weight, seed=7, like=packed).codes, packed.codes)
    assert torch.equal(form.dequantize(form.quantize(weight, seed=7, like=packed)), weight)
    weight[3] *= 0.8
    again = form.dequantize(form.quantize(weight, seed=7, like=packed))
    others = torch.arange(64) != 3
    assert torch.equal(again[others], weight[others])
    assert relative(again[3], weight[3]) < 0.25


@ALL
def test_a_change_that_does_not_fit_gets_new_scales(name):
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 128))
    weight = form.dequantize(packed)
    weight[3] *= 30
    again = form.dequantize(form.quantize(weight, like=packed))
    assert relative(again[3], weight[3]) < 0.2


@ALL
def test_stochastic_rounding_is_unbiased(name):
    """A change far below a step survives in the mean."""
    form = formats.get(name)
    packed = form.quantize(gaussian(32, 128))
    weight = form.dequantize(packed)
    delta = 0.02 * weight.abs().mean()
    inner = weight.abs() < 0.5 * weight.abs().max()
    baked = [form.dequantize(form.quantize(weight + delta, seed=s, like=packed)) for s in range(40)]
    moved = (torch.stack(baked).mean(0) - weight)[inner].mean() / delta
    assert 0.6 < moved < 1.4
    assert same(form.quantize(weight, seed=3), form.quantize(weight, seed=3))
    other = gaussian(32, 128, seed=9)
    assert not same(form.quantize(other, seed=3), form.quantize(other, seed=4))


@ALL
def test_bad_weights_are_refused(name):
    form = formats.get(name)
    bad = torch.ones(64, 128)
    bad[2, 5] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        form.quantize(bad)
    with pytest.raises(FormatError, match="int32"):
        form.quantize(torch.ones(64, 128, dtype=torch.int32))
    with pytest.raises(FormatError, match=r"packed as \(32, 128\)"):
        form.quantize(torch.ones(64, 128), like=form.quantize(torch.ones(32, 128)))


def test_svdquant_computes_its_equation():
    """(x / smooth in int4) R^T + x proj_down proj_up^T, to the rounding of bf16."""
    form, x = formats.get("svdquant_w4a4"), gaussian(30, 128, seed=1).bfloat16()
    weight, smooth = gaussian(48, 128), gaussian(128, seed=2).abs() + 0.5
    plain = form.quantize(weight)
    smoothed = replace(plain, aux=plain.aux | {"smooth_factor": smooth.bfloat16()})
    packed = form.quantize(weight, like=smoothed)  # as a file of others may have it
    assert relative(form.dequantize(packed), weight) < 0.2
    aux = {name: table.float() for name, table in packed.aux.items()}
    groups = (x / aux["smooth_factor"].bfloat16()).float().view(30, 2, 64)
    step = groups.abs().amax(2, keepdim=True) / 7
    rounded = ((groups / step).round() * step).view(30, 128)
    rest = unpack_int4(packed.codes).float().view(48, 2, 64) * aux["scale"].T.unsqueeze(2)
    wanted = rounded @ rest.view(48, 128).T + x.float() @ aux["proj_down"] @ aux["proj_up"].T
    assert relative(form.linear(x, packed), wanted) < 0.03


def test_the_branch_takes_what_is_of_low_rank():
    weight = gaussian(256, 512) * 0.03
    weight += gaussian(256, 8, seed=1) @ gaussian(8, 512, seed=2)
    form = formats.get("svdquant_w4a4")
    packed = form.quantize(weight)
    assert relative(form.dequantize(packed), weight) < 0.003
    best = torch.linalg.svd(weight)
    best = best.U[:, :32] * best.S[:32] @ best.Vh[:32]
    branch = packed.aux["proj_up"].float() @ packed.aux["proj_down"].float().T
    assert relative(branch, weight) < relative(best, weight) * 1.1
    assert same(form.quantize(weight), packed)


def test_baking_keeps_the_branch():
    form, weight = formats.get("svdquant_w4a4"), gaussian(64, 128)
    packed = form.quantize(weight)
    lora = gaussian(64, 2, seed=1) @ gaussian(2, 128, seed=2) * 0.1
    again = form.quantize(weight + lora, seed=1, like=packed)
    for name in ("proj_up", "proj_down", "smooth_factor"):
        assert same_bits(again.aux[name], packed.aux[name])
    assert relative(form.dequantize(again), weight + lora) < 0.15


@ALL
def test_a_plain_model_runs_quantized(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = gaussian(30, 64)
    wanted = model(x)
    state = quantize_module(model, name).state_dict()
    found = model(x)
    assert 0 < relative(found, wanted) < 2 * BOUNDS[name][1]
    copy = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    quantize_module(copy, name).load_state_dict(state)
    assert torch.equal(copy(x), found)
