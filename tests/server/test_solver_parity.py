"""c = 1 against the samplers of the real ComfyUI: equal bit for bit."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from qsched_core.precondition import ScalarCorrection
from qsched_core.solvers import SOLVERS, get_solver


@pytest.fixture(scope="module")
def comfy(comfyui_path):
    """ComfyUI's own modules in this process, on the CPU."""
    sys.path.insert(0, str(comfyui_path))
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        yield SimpleNamespace(
            sampling=importlib.import_module("comfy.k_diffusion.sampling"),
            model_sampling=importlib.import_module("comfy.model_sampling"),
        )
    finally:
        sys.path.remove(str(comfyui_path))


class _Denoiser:
    """What a ComfyUI sampler sees: a callable with the model sampling two levels down."""

    def __init__(self, model_sampling):
        self.patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)
        base = SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=self.patcher)

    def __call__(self, x, sigma, seed=None):
        return torch.tanh(x * 0.7) / (1 + sigma.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "epsilon"])
@pytest.mark.parametrize("batch", [1, 3])
def test_coefficients_of_one_equal_comfyui_bit_for_bit(comfy, name, flow, batch):
    kind = comfy.model_sampling.CONST if flow else comfy.model_sampling.EPS
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0] if flow else [14.6146, 3.5, 1.2, 0.4, 0.0])
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * sigmas[0]
    denoiser = _Denoiser(kind())
    theirs = getattr(comfy.sampling, f"sample_{name}")(
        denoiser, x, sigmas, extra_args={"seed": 11}, disable=True
    )
    solver = get_solver(name)
    for correction in (None, ScalarCorrection((1.0,) * 4, (1.0,) * 4)):
        ours = solver.function(
            denoiser, x, sigmas, {"seed": 11}, correction=correction, **solver.options(flow)
        )
        assert torch.equal(ours, theirs)
    moved = solver.function(
        denoiser,
        x,
        sigmas,
        {"seed": 11},
        correction=ScalarCorrection((1.01,) * 4, (1.0,) * 4),
        **solver.options(flow),
    )
    assert not torch.equal(moved, theirs)
