"""Weight formats: packing, error bounds, bits, and the arithmetic on packed weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qsched_core import formats
from qsched_core.formats import FormatError, base
from qsched_core.formats.module import QuantizedLinear, quantize_module
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.formats.tables import pack, unpack

# Relative error of a Gaussian weight and of the layer's output; bits a weight at 512 inputs.
BOUNDS = {
    "nf4": (0.096, 0.096, 4.13),
    "fp4": (0.13, 0.13, 4.13),
    "llm_int8": (0.009, 0.013, 8.07),
    "int8": (0.009, 0.013, 8.07),
    "w4a8": (0.085, 0.086, 4.51),
    "int3": (0.15, 0.15, 3.51),
    "int2": (0.31, 0.31, 2.51),
}
ALL = pytest.mark.parametrize("name", BOUNDS)  # the others: test_formats_kitchen.py


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(a.aux[k].view(torch.uint8), b.aux[k].view(torch.uint8))
        if a.aux[k].ndim
        else torch.equal(a.aux[k], b.aux[k])
        for k in a.aux
    )


@ALL
def test_error_and_bits_are_as_stated(name):
    weight, x = gaussian(256, 512) * 0.03, gaussian(300, 512, seed=1)
    form, (weight_bound, output_bound, bits) = formats.get(name), BOUNDS[name]
    packed = form.quantize(weight)
    assert relative(form.dequantize(packed), weight) < weight_bound
    assert relative(form.linear(x, packed), x @ weight.T) < output_bound
    assert form.bits <= packed.bits <= bits
    assert packed.nbytes < weight.numel() * bits / 8 + 8


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_the_accuracy(name, dtype):
    """An int8 activation computed in bf16 must not wrap."""
    weight, x = gaussian(64, 512) * 0.03, gaussian(100, 512, seed=1).to(dtype)
    form = formats.get(name)
    out = form.linear(x, form.quantize(weight), gaussian(64, seed=2).to(dtype))
    wanted = x.float() @ weight.T + gaussian(64, seed=2)
    assert out.dtype == dtype
    assert relative(out, wanted) < BOUNDS[name][1] * 1.05


@pytest.mark.parametrize("bits", [2, 3, 4])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_packing_is_lossless(bits, data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)) * 8
    codes = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns)
    )
    codes = torch.tensor(codes, dtype=torch.uint8).view(rows, columns)
    data = pack(codes, bits)
    assert data.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(data, bits), codes)


@ALL
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 150),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_scale_round_trips(name, rows, columns, scale, shift, seed):
    """The logical shape is kept, no value is further off than the group's range allows."""
    weight = (gaussian(rows, columns, seed=seed) + shift) * scale
    form = formats.get(name)
    back = form.dequantize(form.quantize(weight))
    assert back.shape == weight.shape
    assert (back - weight).abs().max() <= 0.7 * weight.abs().max()
    assert torch.isfinite(back).all()


@ALL
def test_zero_and_constant_weights(name):
    form = formats.get(name)
    assert torch.equal(form.dequantize(form.quantize(torch.zeros(8, 64))), torch.zeros(8, 64))
    constant = torch.full((8, 64), 0.37)
    assert relative(form.dequantize(form.quantize(constant)), constant) < 0.07


@ALL
def test_chunks_change_nothing(name, monkeypatch):
    weight = gaussian(50, 96)
    whole = formats.get(name).quantize(weight)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 96 * 7)
    assert same(formats.get(name).quantize(weight), whole)


@ALL
def test_requantizing_keeps_what_did_not_change(name):
    """Baking a LoRA that touches a few rows leaves the others bit-identical."""
    form = formats.get(name)
    packed = form.quantize(gaussian(32, 128))
    weight = form.dequantize(packed)
    again = form.quantize(weight, seed=7, like=packed)
    assert torch.equal(form.dequantize(again), weight)
    weight[3] *= 1.2
    again = form.dequantize(form.quantize(weight, seed=7, like=packed))
    others = torch.arange(32) != 3
    assert torch.equal(again[others], form.dequantize(packed)[others])
    assert not torch.equal(again[3], form.dequantize(packed)[3])


@ALL
def test_stochastic_rounding_is_unbiased(name):
    """A change far below a step survives in the mean."""
    form = formats.get(name)
    packed = form.quantize(gaussian(16, 128))
    weight = form.dequantize(packed)
    delta = 0.02 * weight.abs().mean()
    inner = weight.abs() < 0.5 * weight.abs().max()
    baked = [form.dequantize(form.quantize(weight + delta, seed=s, like=packed)) for s in range(40)]
    moved = (torch.stack(baked).mean(0) - weight)[inner].mean() / delta
    assert 0.6 < moved < 1.4
    assert same(form.quantize(weight, seed=3), form.quantize(weight, seed=3))


@ALL
def test_bad_weights_are_refused(name):
    form = formats.get(name)
    bad = torch.ones(4, 64)
    bad[2, 5] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        form.quantize(bad)
    with pytest.raises(FormatError, match=r"\(4, 4, 3\)"):
        form.quantize(torch.ones(4, 4, 3))
    with pytest.raises(FormatError, match="int32"):
        form.quantize(torch.ones(4, 4, dtype=torch.int32))


def test_unknown_format_lists_the_names():
    with pytest.raises(FormatError, match=r"weight_format='q4' is unknown.*nf4.*int2"):
        formats.get("q4")


def test_w4a8_is_integer_arithmetic():
    """int8 activations, int4 weights, a scale a group and a token: in integers, to fp32 rounding."""
    form, x = formats.get("w4a8"), gaussian(10, 96)
    packed = form.quantize(gaussian(8, 96, seed=1))
    weight = unpack(packed.codes, 4).int() - 8
    codes, scale = base.quantize_tokens(x)
    assert codes.abs().max() == 127
    products = torch.einsum("tgk,ogk->tog", codes.view(10, 3, 32).int(), weight.view(8, 3, 32))
    group_scale = packed.aux["scale"].float() * packed.aux["scale_2"]
    wanted = (products.float() * group_scale).sum(-1) * scale
    assert torch.allclose(form.linear(x, packed), wanted, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("scale, size", [(0.01, 0.2), (1e-4, 1.0), (1e-6, 10.0), (300.0, 0.02)])
@pytest.mark.parametrize("rows", [1, 20])
def test_fp16_products_overflow_only_where_their_result_does(name, scale, size, rows):
    """4096 columns of one sign: the codes alone would sum to far more than fp16 holds."""
    form = formats.get(name)
    x = (gaussian(rows, 4096).sigmoid().add(2) * scale / 3).half()
    packed = form.quantize(gaussian(32, 4096, seed=1).sigmoid().add(2) * size / 3)
    wanted = form.linear(x.float(), packed)
    assert relative(form.linear(x, packed), wanted) < 1e-3


@pytest.mark.parametrize("name", ["int8", "w4a8"])
def test_weight_only_leaves_activations_alone(name):
    form, x = formats.get(name), gaussian(50, 256, seed=1)
    packed = form.quantize(gaussian(64, 256))
    wanted = x @ form.dequantize(packed).T
    assert torch.allclose(form.linear(x, packed, weight_only=True), wanted, atol=1e-4)
    assert relative(form.linear(x, packed), wanted) > 1e-3


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(128, 256))
        self.final_layer = nn.Linear(128, 64)

    def forward(self, x):
        x = self.x_embedder(x)
        for block in self.blocks:
            x = x + block(x)
        shift, scale = self.adaLN_modulation(x).chunk(2, -1)
        return self.final_layer(x * (1 + scale) + shift)


@ALL
def test_a_plain_model_runs_quantized(name):
    torch.manual_seed(0)
    model, x = _Model(), gaussian(30, 64)
    wanted = model(x)
    quantize_module(model, name)
    assert type(model.x_embedder) is nn.Linear and type(model.final_layer) is nn.Linear
    assert model.adaLN_modulation[1].weight_only
    assert model.adaLN_modulation[1].format == ("nf4" if name in ("int2", "int3") else name)
    error = relative(model(x), wanted)
    assert 0 < error < BOUNDS[name][1]
    copy = quantize_module(_Model(), name)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(x), model(x))


def test_a_policy_chooses_the_layers_of_a_plain_model():
    model = quantize_module(
        _Model(), Policy("int8", parse_overrides("blocks.0=keep; final_layer=nf4"))
    )
    kinds = {n: m.format for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {"blocks.1": "int8", "adaLN_modulation.1": "int8", "final_layer": "nf4"}


@pytest.mark.parametrize("elements", [1, 200, 1000])
@pytest.mark.parametrize("name", ["nf4", "fp4", "w4a8", "int3", "int2"])
def test_a_product_in_blocks_is_the_product(name, elements, monkeypatch):
    form, x = formats.get(name), gaussian(2, 5, 96, seed=1)
    packed, bias = form.quantize(gaussian(70, 96)), gaussian(70, seed=2)
    for added in (None, bias):
        whole = torch.nn.functional.linear(x, form.dequantize(packed), added)
        monkeypatch.setattr(base, "PRODUCT_ELEMENTS", elements)
        found = form.linear(x, packed, added, weight_only=True)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        assert form.linear(x[0, 0], packed, added, weight_only=True).shape == (70,)
