"""Calibrated rounding of models that hardly fit: little memory, stopping, bad input."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import rounding_task
import torch
from rounding_cases import INT2, PROMPTS
from torch import nn

from qsched_core.formats import get
from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import (
    GRIDS,
    Gathering,
    Limits,
    RoundedWeights,
    RoundingError,
    RoundingSettings,
    TaskSubject,
    calibrate_layer,
    calibrate_module,
    calibrate_weights,
    grid_of,
    quantized,
    solve,
)
from qsched_core.rounding.moments import FINE_WIDTH
from qsched_core.rounding.pace import Pace
from qsched_core.rounding.plan import Need, Seen, check_rows, needs, turns
from qsched_core.rounding.proof import distances, final_latents

# Memory


def inputs(columns, rows, seed=0):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, 64, generator=random) * torch.logspace(0, -1, 64)
    x = torch.randn(rows, 64, generator=random) @ mix.t() + 0.5 * mix[:, 0]
    return x + 0.1 * torch.randn(rows, columns, generator=random)


def gathered(x_q, x_fp=None, cuts=()):
    sums = Gathering(cuts)
    for q, fp in zip(x_q.split(50), (x_q if x_fp is None else x_fp).split(50), strict=True):
        sums.add(q, fp)
    return sums.parts()


def test_large_sums_are_fp32_and_good_enough():
    x = inputs(FINE_WIDTH + 256, 300)
    (found,) = gathered(x, 0.9 * x)
    assert found.h.dtype == found.cross.dtype == torch.float32
    exact = x.double().t() @ x.double() / len(x)
    assert (found.h - exact).norm() < 1e-6 * exact.norm()
    found.centre()
    centred = torch.cov(x.double().t(), correction=0)
    assert (found.h - centred).norm() < 1e-5 * centred.norm()


@pytest.mark.parametrize("name", GRIDS)
def test_cut_statistics_are_those_of_the_blocks_and_cost_a_part_of_the_gain(name):
    columns, rows = 768, 600
    grid, form = grid_of(name), get(name)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(48, columns, generator=random) * 0.05
    bias = torch.randn(48, generator=random)
    x_fp = inputs(columns, rows)
    x_q = x_fp + 0.02 * inputs(columns, rows, 3)
    pair = grid.pair(x_q, x_fp)
    whole, cut = gathered(*pair), gathered(*pair, Need(48, columns, 3).cuts)
    assert [len(part.mean_q) for part in cut] == [256, 256, 256]
    torch.testing.assert_close(cut[1].h, whole[0].h[256:512, 256:512])
    torch.testing.assert_close(cut[2].cross, whole[0].cross[512:, 512:])
    goal = torch.nn.functional.linear(x_fp, weight, bias)

    def error(found):
        return float((form.linear(x_q, found.packed, found.bias) - goal).square().mean())

    plainly = float((form.linear(x_q, form.quantize(weight), bias) - goal).square().mean())
    one = calibrate_layer(grid, weight, bias, whole)
    three = calibrate_layer(grid, weight, bias, cut)
    assert error(one) < plainly and error(three) < plainly
    assert one.remark == "" and "3 blocks of 256 columns" in three.remark and three.note == ""
    assert form.dequantize(three.packed).shape == weight.shape
    assert three.packed.nbytes == one.packed.nbytes


@pytest.mark.parametrize("name", ["int2", "nf4", "int8"])
@pytest.mark.parametrize("columns", [260, 552])
def test_a_last_block_that_is_shorter_than_a_group_has_a_group_of_its_own(name, columns):
    x = inputs(columns, 600)
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(1))
    need = Need(32, columns, -(-columns // 256))
    found = calibrate_layer(grid_of(name), weight, None, gathered(x, cuts=need.cuts))
    assert found.remark and found.error < (1.0 if name == "int8" else 0.8) * found.plain_error
    stored = [get(name).dequantize(p) for p in (found.packed, get(name).quantize(weight))]
    errors = [(x @ (values - weight).t()).norm() for values in stored]
    assert errors[0] < errors[1]


def test_rows_in_chunks_give_the_same_weight(monkeypatch):
    weight = torch.randn(100, 192, generator=torch.Generator().manual_seed(1))
    moments = gathered(inputs(192, 500))
    for name in ("int2", "int8"):
        one = calibrate_layer(grid_of(name), weight, None, moments)
        with monkeypatch.context() as patch:
            patch.setattr(solve, "CHUNK_ELEMENTS", 7 * 192)
            patch.setattr(solve, "REFIT_ELEMENTS", 1)
            other = calibrate_layer(grid_of(name), weight, None, moments)
        values = [get(name).dequantize(layer.packed) for layer in (one, other)]
        apart = (values[0] - values[1]).norm() / (values[0] - weight).norm()
        assert apart < 0.1 and one.error == pytest.approx(other.error, rel=0.01)  # by sums' order


def test_moments_are_spent_only_if_that_is_allowed():
    weight, moments = torch.randn(32, 64), gathered(inputs(64, 200))
    before = moments[0].copied()
    kept = calibrate_layer(grid_of("nf4"), weight, torch.zeros(32), moments)
    assert torch.equal(moments[0].h, before.h) and torch.equal(moments[0].cross, before.cross)
    spent = calibrate_layer(grid_of("nf4"), weight, torch.zeros(32), moments, spend=True)
    assert torch.equal(kept.packed.codes, spent.packed.codes)
    assert not torch.equal(moments[0].h, before.h)


def test_a_limit_of_memory_decides_how_layers_are_cut_and_taken_in_turn():
    shapes = {"wide": (64, 8192), "small": (64, 512)}
    free = needs(shapes, None)
    assert free["wide"].cuts == () and free["wide"].work > 4 * 4 * 8192**2
    tight = needs(shapes, 300_000_000)
    assert tight["wide"].cuts and tight["wide"].work <= 300_000_000 and not tight["small"].cuts
    assert needs(shapes, free["wide"].work)["wide"] == free["wide"]
    assert turns(["a", "b", "c"], dict.fromkeys("abc", free["wide"]), None) == [["a", "b", "c"]]
    most = free["wide"].work + free["wide"].waiting
    assert turns(["a", "b", "c"], dict.fromkeys("abc", free["wide"]), most) == [["a", "b"], ["c"]]
    with pytest.raises(RoundingError, match=r"layer wide of 64 x 8192 takes .* memory=1000 "):
        needs(shapes, 1000)
    with pytest.raises(RoundingError, match="memory=0 must be"):
        Limits(memory=0)


def test_with_little_memory_a_walk_cuts_and_says_so(tmp_path):
    """Layers of 512 inputs, of which a limit lets half be seen at once; q and k go in turn."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(2))

        def forward(self, x, sigma, cond):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    torch.manual_seed(0)
    model = Wide()
    task = rounding_task.task(model)
    x = torch.randn(8, 512)

    def initial(seeds):
        return torch.stack([x + s % 7 for s in seeds])

    task = replace(task, initial=initial)
    need = Need(512, 512, 1).work
    result = calibrate_weights(
        TaskSubject(task), PROMPTS, Policy("int2"), tmp_path, limits=Limits(memory=need - 1)
    )
    layers = result.weights.layers
    path = result.weights.save(tmp_path / "weights.safetensors")
    for name in layers:
        found = RoundedWeights.load(path).layers[name]
        if result.calibrated and not found.note:
            assert "2 blocks of 256 columns" in found.remark
    made = calibrate_module(
        model,
        TaskSubject(task).states(PROMPTS.calibration, 0, 0),
        "int2",
        limits=Limits(memory=need - 1, scratch=tmp_path),
    )
    assert all("2 blocks" in layer.remark for layer in made.values() if not layer.note)
    assert any(layer.remark for layer in made.values())


class FullError(RuntimeError):
    """A device's own error."""


def fills_up(task, most, blocks=("blocks.1.q",)):
    """Hooks: a layer that is given more than ``most`` states at once has no memory."""

    def check(module, arguments):
        if len(arguments[0]) > most:
            raise FullError("no memory")

    return [task.module.get_submodule(name).register_forward_pre_hook(check) for name in blocks]


@pytest.mark.parametrize("layer", ["blocks.0.q", "blocks.1.proj", "blocks.2.k"])
def test_when_memory_is_out_the_batch_is_halved_and_the_result_is_the_same(
    tmp_path, task, states, layer
):
    settings = RoundingSettings()
    told = []
    limits = Limits(scratch=tmp_path, out_of_memory=(FullError,), tell=told.append)
    expected = calibrate_module(task.module, states, INT2, settings, limits=limits)
    assert not told
    hooks = fills_up(task, 3, (layer,))
    found = calibrate_module(task.module, states, INT2, settings, limits=limits)
    for hook in hooks:
        hook.remove()
    block = layer[: len("blocks.0")]
    assert told == [
        f"out of memory at block {block}: it goes on with batches of {size} states"
        for size in (4, 2)
    ]
    reference = final_latents(TaskSubject(task).source, PROMPTS.heldout)
    chosen = {name: INT2(name, (64, 64)) for name in found}
    apart = []
    for layers in (expected, found):
        with quantized(task.module, layers, chosen):
            apart.append(final_latents(TaskSubject(task).source, PROMPTS.heldout))
    error = sum(distances(apart[0], reference))
    assert sum(distances(apart[1], apart[0])) < 0.02 * error
    assert sum(distances(apart[1], reference)) == pytest.approx(error, rel=0.02)
    for name in found:
        codes = [layers[name].packed.codes for layers in (expected, found)]
        assert (codes[0] != codes[1]).float().mean() < 0.02, name


def test_a_layer_that_has_no_memory_to_be_rounded_is_cut_or_named(
    tmp_path, task, states, monkeypatch
):
    from qsched_core.rounding import walk

    def never(*_, **__):
        raise FullError

    limits = Limits(scratch=tmp_path, out_of_memory=(FullError,))
    monkeypatch.setattr(walk, "calibrate_layer", never)
    with pytest.raises(RoundingError, match=r"layer blocks\.0\.q of 64 x 64 can't be rounded"):
        calibrate_module(task.module, states, INT2, limits=limits)
    monkeypatch.undo()
    hooks = fills_up(task, 0)
    with pytest.raises(RoundingError, match=r"the model does not fit .* one state"):
        calibrate_module(task.module, states, INT2, limits=limits)
    monkeypatch.setattr(walk.Gathering, "add", never)
    for hook in hooks:
        hook.remove()
    with pytest.raises(RoundingError, match=r"block blocks\.0 does not fit .* one state"):
        calibrate_module(task.module, states, INT2, limits=replace(limits, tell=lambda line: None))


# Stopping, and how long it takes


def test_it_can_be_stopped_at_every_batch_and_every_block_of_columns(task, states, tmp_path):
    calls = []
    limits = Limits(scratch=tmp_path, check=lambda: calls.append(1))
    calibrate_module(task.module, states, INT2, limits=limits)
    batches = -(-len(states) // states.batch)
    assert len(calls) >= 3 * (2 + 1) * batches  # three blocks: two stages each and handing on
    weight, moments = torch.randn(16, 1280), gathered(inputs(1280, 100))
    calls.clear()
    calibrate_layer(grid_of("nf4"), weight, None, moments, check=lambda: calls.append(1))
    assert len(calls) >= 1280 // 128 * (1 + 2 * 2)


def test_progress_goes_forward_and_the_time_left_is_that_of_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = []
    pace = Pace(["a", "b", "c"], [10.0, 10.0, 20.0], told.append)
    pace.begin(0, 5.0)  # half of what was expected, as of those after it
    for _ in range(4):
        now[0] += 1
        pace.step(1.25)
    assert [p.done for p in told] == pytest.approx([0.25, 0.5, 0.75, 0.99])
    assert [p.seconds_left for p in told[:3]] == pytest.approx([15, 14, 13])
    assert pace.end(False) == pytest.approx(12)
    pace.begin(1, 5.0)
    assert pace.end(True) == pytest.approx(8)  # found finished: it says nothing of the pace
    assert told[0].name == "a" and told[0].total == 3


def test_a_walk_says_how_far_it_is(task, states, tmp_path, monkeypatch):
    from qsched_core.rounding import pace

    monkeypatch.setattr(pace, "QUIET_SECONDS", 0)
    told = []
    limits = Limits(scratch=tmp_path, on_progress=told.append)
    calibrate_module(task.module, states, INT2, limits=limits)
    places = [(p.index, p.done) for p in told]
    assert {p.index for p in told} == {0, 1, 2} and all(p.seconds_left >= 0 for p in told)
    assert [index for index, _ in places] == sorted(index for index, _ in places)
    for block in range(3):
        shares = [done for index, done in places if index == block]
        assert shares == sorted(shares) and shares[-1] > 0.5


# Bad input


def test_too_few_rows_are_said_and_absurdly_few_refused():
    seen = {"fc": Seen(36, 1), "mod": Seen(1, 1)}
    widths = {"fc": 1024, "mod": 4096}
    assert check_rows(seen, widths, 29) == ""
    few = check_rows(seen, widths, 10)
    assert "10 states give layer fc 360 rows of inputs for its 1024 features; 29 states" in few
    with pytest.raises(RoundingError, match=r"too few calibration prompts: 1 states give layer fc"):
        check_rows(seen, widths, 1)


def test_few_prompts_are_in_the_result(tmp_path, task):
    few = CalibrationPrompts.of(["thing"], [f"other {i}" for i in range(8)])
    told = []
    result = calibrate_weights(
        TaskSubject(task), few, INT2, tmp_path, limits=Limits(tell=told.append)
    )
    assert told == list(result.remarks) and "16 rows of inputs for its 64 features" in told[0]
    again = calibrate_weights(TaskSubject(task), few, INT2, tmp_path)
    assert again.remarks == result.remarks


def test_a_format_that_the_device_cannot_run_and_a_quantized_model_are_refused(
    task, states, monkeypatch
):
    def never(part):
        raise AssertionError("the model ran")

    monkeypatch.setattr(states, "run", never)
    policy = Policy("int2", parse_overrides("proj=fp8_e4m3"))
    with pytest.raises(FormatError, match=r"format='fp8_e4m3' can't run on cpu: .*sm_89"):
        calibrate_module(task.module, states, policy)
    with torch.no_grad():
        task.module.blocks[1].proj.weight[3, 4] = torch.inf
    with pytest.raises(FormatError, match=r"layer blocks\.1\.proj: .*NaN or infinite"):
        calibrate_module(task.module, states, INT2)
    task.module.blocks[0].q.packed = None
    with pytest.raises(RoundingError, match=r"layer blocks\.0\.q is quantized already"):
        calibrate_module(task.module, states, INT2)


@pytest.mark.parametrize("name", GRIDS)
def test_large_inputs_without_any_information_leave_plain_rounding(name):
    """fp32 sums of equal inputs do not cancel to zero."""
    width = FINE_WIDTH + 256
    weight, bias = torch.randn(8, width), torch.randn(8)
    x = torch.linspace(-3, 3, width).expand(64, -1)
    found = calibrate_layer(grid_of(name), weight, bias, gathered(x))
    assert found.note == "its inputs never change"
    assert torch.equal(found.packed.codes, get(name).quantize(weight).codes)
