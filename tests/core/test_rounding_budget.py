"""A size for a model: the choice of formats, what it rests on, and whether it is kept."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rounding_cases import PROMPTS, arguments

from qsched_core.cli import calibrate_weights as command
from qsched_core.formats import get
from qsched_core.formats.base import FormatError
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.rounding import (
    Budget,
    LayerCost,
    Limits,
    Option,
    Point,
    RoundedWeights,
    RoundingError,
    RoundingSettings,
    TaskSubject,
    allocate,
    budget_picture,
    calibrate_to_size,
    choices,
    quantized,
    sized,
    sized_figures,
    sized_report,
)
from qsched_core.rounding.budget import uniform
from qsched_core.rounding.sized import log_line, rest_bytes
from qsched_core.rounding.sweep import Sweep

POLICY = Policy("int2", parse_overrides("unused=keep"))
LADDER = ("int2", "int3", "nf4")
SIZES = {"int2": 10, "int3": 14, "nf4": 17}


def sweep_of(task, limits=None):
    subject = TaskSubject(task)
    chosen = choices(task.module, POLICY)
    states = subject.states(PROMPTS.calibration.part(0, 8), 0, 0)
    return Sweep(
        task.module, states, chosen, [], LADDER, RoundingSettings(), subject.parameters_of,
        limits or Limits(),
    )  # fmt: skip


def run(sweep):
    """The costs, and the layers as they were tried."""
    tried, real = {}, sweep.errors

    def errors(name, *rest):
        found = real(name, *rest)
        tried[name] = found[1]
        return found

    sweep.errors = errors
    return sweep.run({}, lambda done, total: None, lambda found: None), tried


# The choice


def costs_of(errors):
    return [
        LayerCost(
            f"l{k}", 40, tuple(Option(f, SIZES[f], e) for f, e in zip(SIZES, each, strict=True))
        )
        for k, each in enumerate(errors)
    ]


falling = st.tuples(*[st.floats(0, 1) for _ in SIZES]).map(lambda e: sorted(e, reverse=True))


@given(st.lists(falling, min_size=1, max_size=5), st.integers(0, 40))
@settings(deadline=None)
def test_the_choice_fits_and_no_better_one_is_on_the_hulls(errors, more):
    costs = costs_of(errors)
    room = 10 * len(costs) + more
    found = allocate(costs, room)
    assert found.nbytes <= room
    assert found.error <= sum(cost.smallest.error for cost in costs) + 1e-12
    # Lagrange: no choice of the same size or less has a smaller error.
    for each in itertools.product(*(cost.options for cost in costs)):
        if sum(option.nbytes for option in each) <= found.nbytes:
            least = sum(option.error for option in each)
            # what the last step left out may be worth more than one that still fitted
            widest = max(cost.smallest.error for cost in costs)
            assert found.error <= least + widest + 1e-12
    exact = allocate(costs, 17 * len(costs))
    assert exact.error == pytest.approx(sum(min(o.error for o in c.options) for c in costs))


def test_bits_go_where_they_are_worth_most():
    costs = costs_of([(0.9, 0.1, 0.09), (0.2, 0.1, 0.05), (0.3, 0.29, 0.01)])
    assert allocate(costs, 34).formats == {"l0": "int3", "l1": "int2", "l2": "int2"}
    # l2's int3 is worth nothing beside its nf4: the hull leaves it out
    assert allocate(costs, 41).formats == {"l0": "int3", "l1": "int2", "l2": "nf4"}
    assert allocate(costs, 40).formats["l2"] == "int2"
    found = allocate(costs, 41)
    assert found.bits == pytest.approx(8 * 41 / 120) and found.error == pytest.approx(0.31)
    assert found.rows()[0] == {
        "layer": "l0", "format": "int3", "bits": 2.8, "error": 0.1,
        "errors": {"int2": 0.9, "int3": 0.1, "nf4": 0.09},
    }  # fmt: skip
    with pytest.raises(RoundingError, match=r"\(2\.000 bits a weight\) at least"):
        allocate(costs, 29)
    assert uniform(costs, "nf4").nbytes == 51


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "give bits or gb"),
        ({"bits": 3, "gb": 1}, "give bits or gb"),
        ({"bits": 0}, "bits=0 must be"),
        ({"gb": math.nan}, "gb=nan must be"),
        ({"bits": 3, "ladder": ("int2",)}, "two formats"),
        ({"bits": 3, "ladder": ("int2", "int2")}, "each once"),
        ({"bits": 3, "ladder": ("int2", "w4a4")}, "w4a4 looks at its inputs"),
        ({"bits": 3, "ladder": ("int2", "fp8_e4m3")}, "can't be calibrated"),
        ({"bits": 3, "prompts": 0}, "prompts=0"),
    ],
)
def test_a_budget_checks_itself(wrong, match):
    with pytest.raises(RoundingError, match=match):
        Budget(**wrong)
    with pytest.raises(FormatError, match="unknown"):
        Budget(bits=3, ladder=("int2", "int9"))


# What it rests on


def test_costs_are_the_models_own_with_that_layer_rounded(task):
    sweep = sweep_of(task)
    found, tried = run(sweep)
    assert list(found) == list(sweep.options) and len(found) == 10
    for name in ("first", "blocks.0.k", "blocks.2.proj"):
        errors = [option.error for option in found[name].options]
        assert [option.format for option in found[name].options] == list(LADDER)
        assert errors[0] > errors[1] > errors[2] > 0
        wrong = whole = 0.0
        with torch.no_grad():
            for part in sweep.states.parts(3):
                before = sweep.states.run(part)
                with quantized(task.module, {name: tried[name]}, sweep.passes.chosen):
                    now = sweep.states.run(part)
                wrong += float((now - before).square().sum())
                whole += float(before.square().sum())
        assert errors[0] == pytest.approx(wrong / whole, rel=1e-3), name


def test_costs_add_up(task):
    """Errors of single layers, and of all of them rounded at once."""
    sweep = sweep_of(task)
    found, tried = run(sweep)
    single = sum(cost.smallest.error for cost in found.values())
    assert sweep.change(0, tried) == pytest.approx(single, rel=0.5)


def test_evaluations_are_those_that_were_predicted(task):
    sweep, passes = sweep_of(task), []
    predicted, real = sweep.predicted({}), sweep.states.run

    def counted(part):
        passes.append(part.stop - part.start)
        return real(part)

    sweep.states.run = counted
    run(sweep)
    assert sweep.evaluations == pytest.approx(predicted, rel=0.05)
    assert predicted < sum(passes)  # finished blocks are not run again


def test_halved_batches_give_the_same_costs(task):
    expected, _ = run(sweep_of(task))

    class FullError(RuntimeError):
        pass

    def full(module, arguments):
        if len(arguments[0]) > 3:
            raise FullError

    sweep = sweep_of(task, Limits(out_of_memory=(FullError,), tell=lambda line: None))
    hook = task.module.blocks[1].proj.register_forward_pre_hook(full)
    found, _ = run(sweep)
    hook.remove()
    assert sweep.passes.batch == 2
    for name, cost in expected.items():
        for one, other in zip(cost.options, found[name].options, strict=True):
            assert one.error == pytest.approx(other.error, rel=0.1), name


# All of it


def sized_of(task, folder, budget, **more):
    return calibrate_to_size(TaskSubject(task), PROMPTS, POLICY, folder, budget, **more)


def test_a_mix_fits_its_budget_and_is_compared_with_the_line(tmp_path, task):
    told = []
    found = sized_of(
        task, tmp_path, Budget(bits=3.0, ladder=LADDER), limits=Limits(tell=told.append)
    )
    assert any("layers takes about" in line for line in told)
    layers = found.result.weights.layers
    stored = sum(layer.packed.nbytes for layer in layers.values())
    assert [point.format for point in found.uniform] == ["int2", "int3"]
    assert found.mixed.bits <= 3.0 and found.allocation.bits == found.mixed.bits
    if found.holds:
        assert stored == found.allocation.nbytes
        kinds = {n: c.format for n, c in found.result.weights.chosen.items()}
        assert kinds == found.allocation.formats and len(set(kinds.values())) > 1
    low, high = found.uniform
    share = (found.mixed.bits - low.bits) / (high.bits - low.bits)
    expected = low.distance ** (1 - share) * high.distance**share
    assert found.line == pytest.approx(expected)
    text, figures = sized_report(found), sized_figures(found)
    assert f"{found.mixed.distance / found.line:.2f} of it" in text
    json.dumps(figures)
    assert figures["kept"] == ("mixed" if found.holds else "int2")
    picture = budget_picture(found, "Formats by layer")
    assert picture.width == 1200 and len(picture.getcolors(10**6)) > 20
    # again: nothing is weighed or rounded anew
    parts = []
    again = sized_of(
        task,
        tmp_path,
        Budget(bits=3.0, ladder=LADDER),
        on_part=lambda part, done, total: parts.append(part),
        on_block=lambda done: parts.append(done),
    )
    assert not parts and again.allocation == found.allocation and again.mixed == found.mixed


def test_a_mix_that_is_no_better_than_the_line_is_not_kept(tmp_path, task, monkeypatch):
    monkeypatch.setattr(
        sized, "log_line", lambda points, bits: 1e-9 if points else None
    )  # nothing is below such a line
    found = sized_of(task, tmp_path, Budget(bits=3.0, ladder=LADDER))
    assert not found.holds and "the mix is no better than that line" in sized_report(found)
    formats = {choice.format for choice in found.result.weights.chosen.values()}
    assert formats == {found.uniform[0].format} == {"int2"}
    assert sized_figures(found)["kept"] == "int2"


def test_the_line_is_straight_in_the_logarithm():
    points = (Point("int2", 2.5, 0.01), Point("int3", 3.5, 0.0001))
    assert log_line(points, 3.0) == pytest.approx(0.001)
    assert log_line(points[:1], 3.0) == 0.01 and log_line((), 3.0) is None


def test_a_size_of_the_whole_model_counts_what_is_kept(tmp_path, task):
    chosen = choices(task.module, POLICY)
    rest = rest_bytes(task.module, chosen)
    weights = sum(task.module.get_submodule(name).weight.numel() for name in chosen)
    whole = sum(t.numel() * 4 for t in task.module.state_dict().values())
    assert rest == whole - 4 * weights
    least = sum(get("int2").packed_bytes((64, 64)) for _ in chosen)
    gb = (rest + 1.2 * least) / 1e9
    found = sized_of(task, tmp_path, Budget(gb=gb, ladder=LADDER), compare=False)
    assert rest + found.allocation.nbytes <= gb * 1e9 and not found.uniform and found.holds
    assert "not compared" in sized_report(found)
    assert found.allocation.nbytes > least
    with pytest.raises(RoundingError, match="at least"):
        sized_of(task, tmp_path, Budget(gb=(rest + 0.9 * least) / 1e9, ladder=LADDER))


def test_a_format_that_the_user_names_stays(tmp_path, task):
    policy = Policy("int2", parse_overrides("unused=keep; proj=int8"))
    found = calibrate_to_size(
        TaskSubject(task), PROMPTS, policy, tmp_path, Budget(bits=5, ladder=LADDER), compare=False
    )
    formats = found.allocation.formats
    assert {formats[f"blocks.{k}.proj"] for k in range(3)} == {"int8"}
    assert found.allocation.bits <= 5


def test_weighing_goes_on_where_it_was_stopped(tmp_path, task, caplog):
    whole = sized_of(task, tmp_path / "a", Budget(bits=3.0, ladder=LADDER), compare=False)

    class StopError(BaseException):
        pass

    def stop(part, done, total):
        if part == sized.WEIGHING and done == 6:
            raise StopError

    folder = tmp_path / "b"
    budget = Budget(bits=3.0, ladder=LADDER)
    with pytest.raises(StopError):
        sized_of(task, folder, budget, compare=False, on_part=stop)
    seen = []
    again = sized_of(
        task, folder, budget, compare=False,
        on_part=lambda part, done, total: seen.append(done) if part == sized.WEIGHING else None,
    )  # fmt: skip
    assert min(seen) > 0 and len(seen) < len(whole.allocation.costs)
    for one, other in zip(whole.allocation.costs, again.allocation.costs, strict=True):
        assert one.name == other.name
        assert [o.error for o in one.options] == pytest.approx([o.error for o in other.options])
    (path,) = folder.glob("costs-*.json")
    path.write_text(path.read_text()[:-40])
    sized_of(task, folder, budget, compare=False)
    assert "layers are weighed again" in caplog.text


def test_the_command_takes_a_size(tmp_path, capsys):
    out, picture = tmp_path / "weights.safetensors", tmp_path / "choice.png"
    given = [a for a in arguments(tmp_path) if a not in ("--format", "int2")]
    more = ["--bits", "3", "--ladder", "int2, int3", "--picture", str(picture), "--no-compare"]
    figures = tmp_path / "figures.json"
    assert command.main([*given, *more, "--json", str(figures), "--layers", "unused=keep"]) == 0
    told = capsys.readouterr().out
    assert "3 bits a weight: " in told and "of 10 layers weighed" in told
    assert len(json.loads(figures.read_text())["size"]["layers"]) == 10
    assert RoundedWeights.load(out).provenance["format"] == "mixed"
    assert Image.open(picture).size[0] == 1200
    assert command.main([*given, "--picture", str(picture)]) == 1
    assert "give --bits or --gb" in capsys.readouterr().err
    assert command.main([*given, "--bits", "1"]) == 1
    assert "bits a weight) at least" in capsys.readouterr().err
