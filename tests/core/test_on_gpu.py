"""Core on a GPU, against the CPU; and where there is none, on one that is simulated.

The simulated one computes on the CPU, so it can only show that every tensor is where it should be;
what a GPU's arithmetic gives, the tests marked ``gpu`` say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import rounding_task
import torch
from kitchen_cases import BOUNDS as KITCHEN_BOUNDS
from kitchen_cases import gaussian, relative, where_it_is
from simulated_gpu import simulated_gpu
from test_formats import BOUNDS as OTHER_BOUNDS
from test_kernels import GROUPED, WITH_TRITON
from test_rounding import correlated, layer
from torch import nn

from demo import task as demo_task
from qsched_core import formats, kernels
from qsched_core.correction import ScalarCorrection
from qsched_core.devices import place
from qsched_core.formats.base import Packed
from qsched_core.formats.module import quantize_module
from qsched_core.formats.policy import Policy
from qsched_core.prompts import PromptSet
from qsched_core.rounding import (
    Gathering,
    RecordedStates,
    calibrate_layer,
    calibrate_module,
    grid_of,
)
from qsched_core.solvers import SOLVERS, ModelInfo, base
from qsched_core.task import TaskSource
from qsched_core.trajectory import Candidate, StepSolver, Trajectory, rollout

BOUNDS = {**OTHER_BOUNDS, **KITCHEN_BOUNDS}
NAMES = [where_it_is(name) for name in BOUNDS]
GPU = pytest.mark.gpu
FITTED = ("svdquant_w4a4", "w4a8_convrot")  # of other factors or levels on another device
PROMPTS = PromptSet(("a red circle", "two blue squares"), (3, 4))


@pytest.fixture(params=["simulated", pytest.param("real", marks=GPU)])
def gpu(request) -> Iterator[torch.device]:
    if request.param == "real":
        yield torch.device("cuda")
        return
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here")
    with simulated_gpu() as device:
        yield device


def serving(name: str, device: torch.device) -> formats.WeightFormat:
    """The format; the test is skipped, with the reason, if a real GPU can't run it."""
    form = formats.get(name)
    reason = form.available(device) if torch.cuda.is_available() else None
    if reason is not None:
        pytest.skip(reason)
    return form


def on(device, packed: Packed) -> bool:
    return all(t.device.type == device.type for t in (packed.codes, *packed.aux.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_that_of_the_weights_on_a_cpu(name, dtype, gpu):
    """A bias, many tokens, and one token alone, which integer kernels do not take."""
    form, weight, bias = serving(name, gpu), gaussian(512, 2048) * 0.03, gaussian(512, seed=2)
    packed, x = form.quantize(weight), gaussian(64, 2048, seed=1)
    there = packed.to(gpu)
    for rows in (x, x[:1]):
        wanted = rows @ weight.T
        found = form.linear(rows.to(gpu, dtype), there, bias.to(gpu, dtype))
        assert found.dtype == dtype and found.device.type == "cuda"
        bound = BOUNDS[name][1] * (1.05 if len(rows) > 1 else 1.25)
        assert relative(found.cpu().float() - bias.to(dtype).float(), wanted) < bound + 0.005
    only = form.linear(x.to(gpu, dtype), there, weight_only=True)
    exact = x.to(dtype).float() @ form.dequantize(packed).T
    assert relative(only.cpu(), exact) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_gives_the_cpus_codes(name, gpu):
    """But where a value lies between two codes to the last digit: a GPU divides otherwise."""
    form, weight = serving(name, gpu), gaussian(256, 512) * 0.03
    packed, found = form.quantize(weight), form.quantize(weight.to(gpu), measure=True)
    assert on(gpu, found) and found.shape == packed.shape
    back, wanted = form.dequantize(found).cpu(), form.dequantize(packed)
    assert found.error == pytest.approx(relative(wanted, weight), rel=0.01)
    if name not in FITTED:
        assert ((back - wanted).abs() > 1e-3 * weight.abs().max()).float().mean() < 1e-2
    baked = form.quantize(weight.to(gpu), seed=3, like=found)
    assert on(gpu, baked)
    assert relative(form.dequantize(baked).cpu(), weight) < 2 * BOUNDS[name][0]


@pytest.mark.parametrize("name", ["nf4", "llm_int8", "w4a8", "int3", "int2"])
def test_a_convolution_runs_on_its_dequantized_weight(name, gpu):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 64, 3, padding=1), gaussian(2, 32, 9, 9)
    weight = formats.get(name).dequantize(formats.get(name).quantize(conv.weight.detach()))
    wanted = nn.functional.conv2d(x, weight, conv.bias, padding=1).detach()
    made = quantize_module(nn.Sequential(conv), Policy(name, min_weights=0)).to(gpu)
    assert relative(made(x.to(gpu)).detach().cpu(), wanted) < 5e-3  # TF32


def cpu_noise(x, seed=None):
    """Draws on the CPU, so that both devices get the same."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(x.shape, generator=generator).to(x.device)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_trajectory_ends_where_it_ends_on_a_cpu(name, gpu, monkeypatch):
    monkeypatch.setattr(base, "default_noise_sampler", cpu_noise)
    training = torch.linspace(0.03, 14.7, 1000)
    sigmas, flow = ((14.6146, 3.5, 1.2, 0.4, 0.0), False)
    trajectory = Trajectory(sigmas, flow, (StepSolver(name),))
    candidates = [
        Candidate(trajectory, ScalarCorrection((a, 0.97, 1.02, 1.0), (1.05, 0.99, b, 1.0)))
        for a, b in ((1.0, 1.0), (0.95, 1.1))
    ]

    def model(x, sigma):
        return torch.tanh(x * 0.7) / (1 + sigma.reshape(-1, 1, 1, 1))

    def run(device):
        info = ModelInfo(flow, 1.0, training.to(device))
        x, levels = gaussian(2, 4, 6, 6).to(device) * sigmas[0], torch.tensor(sigmas).to(device)
        return rollout(model, x, levels, candidates, info=info, seeds=(4, 9)).latents

    found = run(gpu)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), run("cpu"), rtol=1e-4, atol=1e-4)


def test_the_demo_model_draws_what_it_draws_on_a_cpu(gpu):
    """Unquantized and in two bits, from text to pixels."""
    for make in (demo_task.full, demo_task.int2):
        pictures = []
        for device in (gpu, torch.device("cpu")):
            source = TaskSource(make(device))
            candidate = Candidate(source.trajectory, ScalarCorrection.identity(4))
            (found,) = source.images(PROMPTS, [candidate])
            pictures.append(found.cpu().float())
        assert (pictures[0] - pictures[1]).abs().mean() < 2 / 255


@pytest.mark.parametrize("name", ["int2", "nf4", "w4a8"])
def test_calibrated_rounding_repairs_as_much_as_on_a_cpu(name, gpu):
    weight, bias = layer()
    x = correlated()
    errors = []
    for device in (gpu, torch.device("cpu")):
        sums, grid = Gathering(), grid_of(name)
        for part in x.to(device).split(100):
            sums.add(*grid.pair(part, part))
        found = calibrate_layer(grid, weight.to(device), bias.to(device), sums.moments())
        assert on(device, found.packed) and found.bias.device.type == device.type
        errors.append(found.error)
        assert found.note == "" and found.error < found.plain_error
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_a_walk_through_a_model_gives_what_it_gives_on_a_cpu(gpu):
    """It works where the model is; what it found waits on the CPU."""
    errors = []
    for device in (gpu, torch.device("cpu")):
        whole = rounding_task.task(rounding_task.net().to(device))
        task = replace(
            whole,
            initial=lambda seeds, whole=whole, device=device: whole.initial(seeds).to(device),
            condition=lambda prompts, whole=whole, device=device: {
                name: value.to(device) for name, value in whole.condition(prompts).items()
            },
        )
        states = RecordedStates(TaskSource(task, 0), task.module, PROMPTS, 1)
        found = calibrate_module(task.module, states, Policy("int2", min_weights=0))
        assert all(on(torch.device("cpu"), layer.packed) for layer in found.values())
        errors.append([layer.error for layer in found.values() if layer.error is not None])
    assert len(errors[0]) >= 6
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


@GPU
@WITH_TRITON
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("shape", [(3072, 3072), (33, 130), (1280, 2560 * 9), (1, 1)], ids=str)
def test_triton_gives_the_cpus_values(name, shape):
    """fp32 bit for bit, 16 bits rounded once; torch on the GPU within one rounding of fp32."""
    form = formats.get(name)
    engine, refused = kernels.choose(
        place("cuda"), torch.float32, torch.device("cuda", torch.cuda.current_device())
    )
    assert engine == "triton" or torch.cuda.get_device_capability() < (8, 0), refused
    if engine != "triton":
        pytest.skip(refused["triton"])
    packed = form.quantize(gaussian(*shape) * 0.03)
    there, wanted = packed.to("cuda"), form.unpack_by("torch", packed, torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = form.unpack_by("triton", there, dtype).cpu()
        assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))
        by_torch = form.unpack_by("torch", there, dtype).cpu()
        torch.testing.assert_close(by_torch.float(), wanted.to(dtype).float(), rtol=1e-2, atol=1e-6)


@GPU
@pytest.mark.parametrize("name", ["nf4", "w4a8", "int3", "int2"])
def test_compiled_layers_and_cuda_graphs_give_the_same(name):
    """torch.compile with CUDA graphs of its own, and a graph that is recorded by hand."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).half()
    made = quantize_module(model, Policy(name, min_weights=0)).cuda()
    x, other = (gaussian(64, 256, seed=s).cuda().half() for s in (1, 2))
    with torch.no_grad():
        wanted = [made(x), made(other)]
        compiled = torch.compile(made, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            for value, goal in zip((x, other), wanted, strict=True):
                assert relative(compiled(value.clone()).clone(), goal) < 2e-3
        still = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made(still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(still)
        for value, goal in zip((x, other), wanted, strict=True):
            still.copy_(value)
            graph.replay()
            assert relative(out, goal) < 2e-3


@GPU
@pytest.mark.parametrize("name", GROUPED)
def test_a_weight_on_another_gpu_is_unpacked_there(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    form = formats.get(name)
    packed = form.quantize(gaussian(64, 256))
    found = form.dequantize(packed.to("cuda:1"), torch.float16)
    assert found.device.index == 1
    torch.testing.assert_close(found.cpu(), form.dequantize(packed, torch.float16))
