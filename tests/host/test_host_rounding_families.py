"""Calibrated rounding on ComfyUI's own model classes: the walk finds its way, and what it gives is nearer."""

from __future__ import annotations

import pytest
import torch
from inside import management  # ComfyUI on the CPU, before its models are imported

from benchmarks.families import TINY, Inputs, outcome
from qsched_core.formats.policy import Policy, parse_overrides
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import TaskSubject, choices
from qsched_core.rounding.blocks import blocks_of
from qsched_core.task import Task

assert management.get_torch_device().type == "cpu"
NAMES = tuple(TINY)
QUICK = ("flux", "wan")
# Names written out, and how far their outputs reach: the index of the last block that needs them.
SD15 = {
    "input_blocks.0.0": 16, "input_blocks.1.0": 2, "input_blocks.1.1": 14, "input_blocks.2.0": 11,
    "input_blocks.3.0": 5, "input_blocks.3.1": 9, "middle_block.0": 7, "middle_block.1": 8,
    "middle_block.2": 9, "output_blocks.0.0": 10, "output_blocks.0.1": 11, "output_blocks.1.0": 12,
    "output_blocks.1.1": 13, "output_blocks.1.2": 14, "output_blocks.2.0": 15,
    "output_blocks.2.1": 16, "output_blocks.3.0": 17, "output_blocks.3.1": 17,
}  # fmt: skip
FLUX = {"double_blocks.0": 1, "double_blocks.1": 2, "single_blocks.0": 3, "single_blocks.1": 3}


@pytest.mark.parametrize(("name", "wanted"), [("sd15", SD15), ("flux", FLUX)])
def test_blocks_are_found_in_the_order_in_which_they_run(name, wanted):
    module = TINY[name].module()
    states = Inputs(TINY[name], module, 2, 0)
    found = blocks_of(module, lambda: states.run(slice(0, 1)))
    assert {block.name: block.last_use for block in found} == wanted
    assert [block.name for block in found] == list(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_is_chosen_lies_in_a_block(name):
    module = TINY[name].module()
    states = Inputs(TINY[name], module, 2, 0)
    starts = tuple(f"{b.name}." for b in blocks_of(module, lambda: states.run(slice(0, 1))))
    chosen = choices(module, Policy("int3"))
    assert len(chosen) > 10 and all(f"{layer}.".startswith(starts) for layer in chosen)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in NAMES]
)
def test_calibrated_int3_is_nearer_on_unseen_inputs(name):
    found = outcome(TINY[name])
    assert found.ratio < 0.6 and found.plain < 0.5
    assert not any(layer.note for layer in found.layers.values())
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in found.module.modules())


def test_a_unets_skips_reach_the_quantized_stream():
    """Some layers of every stretch are rounded, to int2, which errs enough for skips to matter."""
    layers = parse_overrides("*=keep; *.attn2.to_?=int2; *.proj_in=int2; *.emb_layers.1=int2")
    found = outcome(TINY["sdxl"], Policy("int2", layers))
    parts = {name.split(".")[0] for name in found.layers}
    assert parts == {"input_blocks", "middle_block", "output_blocks"}
    assert found.ratio < 0.8


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_a_recorded_call_runs_as_it_did(name):
    tiny, module, given = TINY[name], TINY[name].module(), []

    def denoise(x, sigma, context, **extra):
        output = module(
            x, sigma * tiny.time, context=context, control=None, transformer_options={}, **extra
        )
        given.append(output)
        return x - sigma.view(-1, *[1] * (x.ndim - 1)) * output

    inputs = Inputs(tiny, module, 2, 0)
    task = Task(
        denoise,
        lambda seeds: inputs.latents[: len(seeds)].clone(),
        lambda prompts: {"context": inputs.context, **inputs.extra},
        lambda latents: latents,
        (1.0, 0.5, 0.0),
        8,
        8,
        {"model": name},
        module=module,
    )
    prompts = CalibrationPrompts.of(["one", "two"], ["three"]).calibration
    states = TaskSubject(task).states(prompts, 0, 0)
    wanted = torch.stack(given[:2], 1).flatten(0, 1)  # the steps of one prompt, then of the other
    found = torch.cat([states.run(part) for part in states.parts(3)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
