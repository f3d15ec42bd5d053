"""int8 activations: how tokens are rounded, the blocked integer product, and LLM.int8()."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsched_core import formats
from qsched_core.formats import int8, llm_int8, tables
from qsched_core.formats.base import quantize_tokens

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
BOTH = pytest.mark.parametrize("name", ["int8", "llm_int8"])
OUTLIERS = (3, 40, 77)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def with_outliers(rows: int = 30, features: int = 128) -> torch.Tensor:
    """Inliers below 6, and three features with some magnitudes of 20 to 60."""
    x = gaussian(rows, features).clamp(-4, 4)
    for place, feature in enumerate(OUTLIERS):
        x[place::4, feature] = 20.0 * (place + 1) * (-1) ** place
    return x


def exact(x: torch.Tensor, packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of the codes in whole numbers, scaled in fp64."""
    codes, scale = quantize_tokens(x)
    products = codes.long() @ packed.codes.long().T
    out = products.double() * scale.double() * packed.aux["scale"].double().view(1, -1)
    return out if bias is None else out + bias.double()


@DTYPES
@given(
    rows=st.integers(1, 6),
    features=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 3e3]),
    seed=st.integers(0, 999),
)
@example(rows=6, features=1, scale=1e-4, seed=381)  # a token that is zero in fp16
@settings(max_examples=60, deadline=None)
def test_tokens_round_to_their_largest_magnitude(dtype, rows, features, scale, seed):
    x = (gaussian(rows, features, seed=seed) * scale).to(dtype)
    codes, found = quantize_tokens(x)
    wanted = (x.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    assert torch.equal(found, wanted)
    assert torch.equal(codes, (x.float() / wanted).round().clamp(-127, 127).to(torch.int8))


def test_the_largest_value_of_a_token_never_wraps():
    """Every positive bf16 number as a token's largest."""
    largest = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    codes, _ = quantize_tokens(torch.stack([largest, -largest], 1))
    assert codes[:, 0].min() >= 0 and codes[:, 1].max() <= 0
    normal = largest.float() > 1e-27
    assert (codes[normal] == torch.tensor([127, -127], dtype=torch.int8)).all()


def test_tokens_keep_their_shape_in_blocks_and_without(monkeypatch):
    x = gaussian(3, 11, 24).bfloat16()
    whole = quantize_tokens(x)
    assert whole[0].shape == x.shape and whole[1].shape == (3, 11, 1)
    monkeypatch.setattr(tables, "CACHE_ELEMENTS", 24 * 5)
    for found, wanted in zip(quantize_tokens(x), whole, strict=True):
        assert torch.equal(found, wanted)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 17, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_the_blocked_product_is_exact_integer_arithmetic(dtype, rows, bias, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK_ROWS", 16)
    monkeypatch.setattr(int8, "BLOCK_ELEMENTS", 16 * 24)
    form, x = formats.get("int8"), gaussian(rows, 96).to(dtype)
    packed = form.quantize(gaussian(70, 96, seed=1))
    added = gaussian(70, seed=2).to(dtype) if bias else None
    step = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative(form.linear(x, packed, added), exact(x, packed, added)) < step


@DTYPES
@pytest.mark.parametrize("size, weight_size", [(0.01, 0.2), (1e-4, 1.0), (1.0, 1e-3)])
def test_integers_as_floats_give_the_integer_product(dtype, size, weight_size):
    """Where torch has no integer product for a device; 4096 columns of one sign."""
    packed = formats.get("int8").quantize(gaussian(30, 4096, seed=1).abs() * weight_size)
    x, bias = (gaussian(5, 4096).abs() * size).to(dtype), gaussian(30, seed=2).to(dtype)
    codes, scale = int8.quantize_tokens(x)
    found = int8.float_product(codes, scale, packed, bias, dtype)
    step = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert relative(found, exact(x, packed, bias)) < step


@BOTH
@DTYPES
def test_any_layout_of_x_gives_the_rows_of_the_plain_one(name, dtype):
    form = formats.get(name)
    packed, bias = form.quantize(gaussian(40, 64)), gaussian(40, seed=3).to(dtype)
    x = (gaussian(2, 5, 64, seed=1) * 2.5).to(dtype)
    flat = form.linear(x.reshape(10, 64), packed, bias)
    wanted = flat.view(2, 5, 40)
    assert torch.equal(form.linear(x, packed, bias), wanted)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    for odd in (turned, strided):
        assert not odd.is_contiguous()
        assert torch.equal(form.linear(odd, packed, bias), wanted)
    calm = x.clamp(-4, 4)  # without outliers a token does not depend on the others
    alone = torch.cat([form.linear(row, packed, bias) for row in calm.reshape(10, 1, 64)])
    together = form.linear(calm.reshape(10, 64), packed, bias)
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    assert form.linear(x[0, 0], packed, bias).shape == (40,)


def test_a_cpu_without_an_integer_product_does_the_same_in_floats(monkeypatch):
    form, x = formats.get("int8"), gaussian(20, 96)
    packed, bias = form.quantize(gaussian(33, 96, seed=1)), gaussian(33, seed=2)
    wanted = exact(x, packed, bias)
    monkeypatch.setattr(int8, "AVX512", False)
    assert relative(form.linear(x, packed, bias), wanted) < 1e-6
    assert form.backend("cpu") == "torch cpu, integers as floats"


def test_outliers_are_found_by_feature_from_6_on():
    x = torch.zeros(4, 8)
    x[0, 2], x[3, 5], x[1, 6] = 6.0, -6.5, 5.99
    assert llm_int8.outlier_columns(x).tolist() == [2, 5]


@DTYPES
def test_llm_int8_is_the_published_decomposition(dtype):
    """arXiv 2208.07339, equation 8, with the scale of a token's values below the threshold."""
    form, x = formats.get("llm_int8"), with_outliers().to(dtype)
    packed, bias = form.quantize(gaussian(48, 128, seed=1)), gaussian(48, seed=2).to(dtype)
    outlying = (x.abs() >= 6).any(0)
    assert outlying.nonzero().flatten().tolist() == list(OUTLIERS)
    scale = x.float().masked_fill(x.abs() >= 6, 0).abs().amax(1, keepdim=True) / 127
    codes = (x.float() / scale).round()[:, ~outlying].double()
    weight, weight_scale = packed.codes.double(), packed.aux["scale"].double()
    inner = (codes @ weight[:, ~outlying].T) * scale.double() * weight_scale.T
    outer = x[:, outlying].double() @ (weight * weight_scale)[:, outlying].T
    step = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert relative(form.linear(x, packed, bias), inner + outer + bias.double()) < step


def test_llm_int8_has_the_codes_and_the_product_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    form, x = formats.get("llm_int8"), with_outliers()
    weight = gaussian(48, 128, seed=1)
    packed = form.quantize(weight)
    theirs, weight_scale, _ = functional.int8_vectorwise_quant(weight)
    assert (packed.codes.int() - theirs.int()).abs().max() <= 1
    assert (packed.codes == theirs).float().mean() > 0.999
    assert torch.allclose(packed.aux["scale"].view(-1) * 127, weight_scale)
    codes, scale, columns = functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert columns.tolist() == llm_int8.outlier_columns(x).tolist()
    mixed = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default
    wanted, _ = mixed(x, codes, packed.codes, scale, weight_scale, columns)
    assert relative(form.linear(x, packed), wanted) < 1e-4


def test_outliers_do_not_cost_llm_int8_its_accuracy():
    x, weight = with_outliers(), gaussian(48, 128, seed=1)
    errors = {}
    for name in ("int8", "llm_int8"):
        form, before = formats.get(name), x.clone()
        errors[name] = relative(form.linear(x, form.quantize(weight)), x @ weight.T)
        assert torch.equal(x, before)
    assert errors["llm_int8"] < 0.013 < 2 * errors["llm_int8"] < errors["int8"]


def test_llm_int8_without_outliers_is_int8():
    x, weight = gaussian(20, 64).clamp(-4, 4), gaussian(30, 64, seed=1)
    found, wanted = (
        formats.get(n).linear(x, formats.get(n).quantize(weight)) for n in ("llm_int8", "int8")
    )
    assert torch.equal(found, wanted)


@BOTH
def test_nan_in_a_token_stays_visible(name):
    """An int8 code can't hold NaN; the token's scale carries it to the output."""
    form, x = formats.get(name), gaussian(4, 64)
    x[1, 7] = float("nan")
    bad = form.linear(x, form.quantize(gaussian(8, 64, seed=1))).isnan()
    assert bad[1].all() and not bad[[0, 2, 3]].any()
