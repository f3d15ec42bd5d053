"""A solver's new option reaches the nodes through the registry: nothing in nodes/ names it."""

from __future__ import annotations

import importlib
import inspect
import sys

import inside  # noqa: F401  ComfyUI and the pack become importable
import pytest
import torch

comfy_sample = importlib.import_module("comfy.sample")
solvers = importlib.import_module("qsched_pack.qsched_core.solvers")
registry = importlib.import_module("qsched_pack.qsched_core.solvers.registry")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
trajectories = importlib.import_module("qsched_pack.qsched_core.trajectory")
host = importlib.import_module("qsched_pack.nodes.host.trajectories")

FAMILIES = ("inputs", "sampling", "calibration", "evaluation")
DRIFTS: list[float] = []


def drifting(*, drift: float):
    """Jumps to D', and away from it by ``drift`` on the way."""
    DRIFTS.append(drift)
    return lambda step: step.denoised + drift * step.sigma_next


@pytest.fixture
def nodes(monkeypatch):
    """The nodes that have solver options, made while one more solver is registered."""
    drift = registry.Option("drift", 0.25, 0.0, 3.0, "How far it drifts.")
    monkeypatch.setitem(solvers.SOLVERS, "drifting", solvers.Solver(drifting, options=(drift,)))
    names = [f"qsched_pack.nodes.{family}" for family in FAMILIES]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    DRIFTS.clear()
    try:
        families = [importlib.import_module(name) for name in names[1:]]
        found = {node.__name__: node for family in families for node in family.NODES}
        yield {n: c for n, c in found.items() if n != "QSchedAroundSampler"}
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def test_every_node_with_options_has_its_widget(nodes):
    assert len(nodes) == 5
    for name, node in nodes.items():
        widget = node.INPUT_TYPES()["optional"]["drift"][1]
        own, number = widget["options"]
        assert (own["key"], own["inputs"]) == ("solver's own", {"required": {}}), name
        (field,) = number["inputs"]["required"].values()
        assert (field[1]["default"], field[1]["min"], field[1]["max"]) == (0.25, 0.0, 3.0), name
        assert "drifting (0.25): How far it drifts." in widget["tooltip"]
        assert "drift" in inspect.getfullargspec(node.execute).args, name


@pytest.mark.parametrize(
    ("solver", "drift", "says"),
    [
        ("drifting", 3.5, 'drift=3.5 must be "solver\'s own" or a number from 0 to 3'),
        ("euler", 0.5, "drift=0.5 is no option of solver euler"),
        ("drifting", 0.5, None),
        ("euler", -1.0, None),
    ],
)
def test_its_value_is_checked_before_the_model_runs(nodes, plain, solver, drift, says):
    """In the node's run: what ComfyUI asks before a graph, it shows as one error an input."""
    sigmas, flow = host.sigmas_and_flow(plain, "simple", 2)
    schedule = schedules.QSchedule.identity(
        trajectories.Trajectory.of(sigmas.tolist(), solver, flow, {})
    )
    node = nodes["QSchedSampler"].PREPARE_CLASS_CLONE(None)
    if says is None:
        node.execute(schedule=schedule, solver=solver, drift=drift)
        return
    with pytest.raises(ValueError) as error:
        node.execute(schedule=schedule, solver=solver, drift=drift)
    assert says in str(error.value)


@pytest.mark.parametrize(("given", "used"), [({"drift": 1.5}, 1.5), ({}, 0.25)])
def test_it_reaches_the_solver(nodes, plain, conditioning, given, used):
    sigmas, flow = host.sigmas_and_flow(plain, "simple", 2)
    trajectory = trajectories.Trajectory.of(sigmas.tolist(), "drifting", flow, given)
    node = nodes["QSchedSampler"].PREPARE_CLASS_CLONE(None)
    (sampler,) = node.execute(
        schedule=schedules.QSchedule.identity(trajectory), solver="drifting", **given
    ).result
    empty = torch.zeros(1, 16, 12, 12)
    noise = comfy_sample.prepare_noise(empty, 3)
    comfy_sample.sample_custom(
        plain, noise, 1.0, sampler, sigmas, conditioning, conditioning, empty, disable_pbar=True
    )
    assert [used] == DRIFTS
