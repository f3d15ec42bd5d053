"""The correction around any solver: exact for Euler, bit for bit nothing at 1."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.correction import AroundCorrection, CorrectedModel, ScalarCorrection
from qsched_core.solvers import sample_euler

FLOW = (1.0, 0.9, 0.75, 0.5, 0.0)
VE = (14.6146, 3.5, 1.2, 0.4, 0.0)
ONES = ScalarCorrection.identity(4)
COEFFICIENT = st.floats(0.8, 1.25)


def model(x, sigma, **_):
    return torch.tanh(0.7 * x) / (1 + sigma.reshape(-1, 1, 1, 1))


def noise():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(
    st.sampled_from([FLOW, VE]),
    st.tuples(*[COEFFICIENT] * 4),
    st.tuples(*[COEFFICIENT] * 4),
)
def test_around_euler_it_is_q_scheds_euler(sigmas, c_x, c_eps):
    correction = ScalarCorrection(c_x, c_eps)
    x, levels = noise() * sigmas[0], torch.tensor(sigmas, dtype=torch.float64)
    around = CorrectedModel(model, AroundCorrection.of(sigmas, correction))
    found = sample_euler(around, x, levels)
    wanted = sample_euler(model, x, levels, correction=correction)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_coefficients_of_one_give_the_models_own_answer():
    around = CorrectedModel(model, AroundCorrection.of(FLOW, ONES))
    x, sigma = noise(), torch.full((2,), 0.75)
    assert torch.equal(around(x, sigma), model(x, sigma))


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.9999, 0), (0.95, 0), (0.90000001, 1), (0.9, 1), (0.6, 2), (0.5, 3), (0.1, 3), (7.0, 0)],
)  # fmt: skip
def test_an_evaluation_belongs_to_the_step_it_lies_in(sigma, step):
    assert AroundCorrection.of(FLOW, ONES).step(sigma) == step


def test_what_a_sampler_reads_of_the_model_is_the_models():
    inner = SimpleNamespace(model_sampling="its own")
    around = CorrectedModel(SimpleNamespace(inner_model=inner), AroundCorrection.of(FLOW, ONES))
    assert around.inner_model is inner
    with pytest.raises(AttributeError):
        _ = around.nothing


def test_nan_stops_with_the_step():
    def broken(x, sigma):
        return x * torch.nan if sigma[0] < 0.8 else x

    around = CorrectedModel(broken, AroundCorrection.of(FLOW, ONES))
    around(noise(), torch.full((2,), 0.9))
    with pytest.raises(ValueError, match="step 3 of 4"):
        around(noise(), torch.full((2,), 0.75))
