"""Sources: pictures under candidates of any trajectory, and what may be held against them."""

from __future__ import annotations

import logging
from dataclasses import replace

import plain_task
import pytest
import torch
from planted import READER, Planted

from qsched_core.correction import ScalarCorrection
from qsched_core.prompts import PromptSet
from qsched_core.source import SourceError, check_reference, scored
from qsched_core.task import TaskSource
from qsched_core.trajectory import Candidate, Trajectory

PROMPTS = PromptSet(tuple(f"thing {i}" for i in range(5)), tuple(range(5)))
LEVELS = (1.0, 0.7, 0.3, 0.0)


def candidates():
    """Of two noise grids and two solvers, mixed up."""
    trajectories = [
        Trajectory.of(LEVELS),
        Trajectory.of((1.0, 0.4, 0.0)),
        Trajectory.of(LEVELS, "euler_ancestral"),
    ]
    made = [Candidate.identity(trajectory) for trajectory in trajectories]
    moved = ScalarCorrection((1.0, 1.02, 1.0), (0.9, 1.0, 1.0))
    return [made[1], Candidate(trajectories[0], moved), made[2], made[0]]


def test_candidates_of_several_trajectories_each_get_their_own_pictures():
    together = TaskSource(plain_task.quantized("cpu"))
    made = together.images(PROMPTS, candidates())
    assert made.shape == (4, 5, 32, 32, 3)
    for candidate, pictures in zip(candidates(), made, strict=True):
        alone = TaskSource(plain_task.quantized("cpu"))
        torch.testing.assert_close(pictures, alone.images(PROMPTS, [candidate])[0])
    assert not torch.allclose(made[0], made[3]) and not torch.allclose(made[2], made[3])


def test_evaluations_are_shared_between_trajectories_that_begin_alike():
    """The first evaluation depends on noise and sigma alone, whatever comes after it."""
    source = TaskSource(plain_task.quantized("cpu"))
    few = candidates()
    source.images(PROMPTS, [few[3]])
    assert source.nfe == 3 * 5
    source.images(PROMPTS, [few[0]])  # its second level is another
    assert source.nfe == (3 + 1) * 5
    source.images(PROMPTS, [few[3]])
    assert source.nfe == (3 + 1) * 5


def test_steps_are_told_and_may_stop_the_work():
    source, steps = TaskSource(plain_task.quantized("cpu")), []
    source.images(PROMPTS, [Candidate.identity(source.trajectory)], lambda: steps.append(1))
    assert len(steps) == 3

    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        source.images(PROMPTS, [Candidate.identity(source.trajectory)], stop)


def test_pictures_are_scored_in_parts_and_handed_on(monkeypatch):
    monkeypatch.setattr("qsched_core.source.SCORED_BYTES", 3 * 4 * 2 * 2)  # two of two candidates
    seen, asked = [], []

    def evaluate(few, prompts):
        from qsched_core.objective import Scores

        asked.append(len(prompts))
        rows = [[float(seed) + k for seed in prompts.seeds] for k in range(len(few))]
        return [Scores(row, row, row) for row in rows]

    source = Planted(evaluate)
    few = [Candidate.identity(source.trajectory)] * 2
    found = scored(source, READER, few, PROMPTS, on_pictures=lambda *told: seen.append(told))
    assert asked == [2, 2, 1]
    assert found[1].jaq == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert [len(told[3]) for told in seen] == [2, 2, 2, 2, 1, 1]
    assert all(told[0] is source for told in seen)


def source(**changes):
    return TaskSource(replace(plain_task.quantized("cpu"), **changes))


KNOWN = {"model": "full", "source_hash": "these weights", "patches": ""}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sigmas": (1.0, 0.5, 0.0)}, r"other noise levels .*0\.5"),
        ({"solver": "lcm"}, "other solvers .*lcm, not euler"),
        ({"width": 64}, "other size"),
        ({"provenance": KNOWN | {"source_hash": "others"}}, "other weights"),
        ({"provenance": KNOWN | {"patches": "a lora"}}, "other LoRAs"),
    ],
)
def test_a_reference_that_is_another_model_is_refused(change, says):
    with pytest.raises(SourceError, match=says):
        check_reference(source(), source(**change))


def merged(**found):
    return source(provenance=KNOWN | found)


def test_a_lora_that_was_merged_before_the_rounding_is_on_the_reference(caplog):
    """A checkpoint, its LoRA, then the rounding: the reference is what came before the rounding."""
    rounded = merged(merged_patches="a lora")
    check_reference(rounded, merged(patches="a lora"))
    check_reference(rounded, merged(merged_patches="a lora"))
    assert not caplog.text
    for other in ({}, {"patches": "another"}, {"merged_patches": "another"}):
        with pytest.raises(SourceError, match="other LoRAs"):
            check_reference(rounded, merged(**other))
    check_reference(merged(merged_patches="a lora", patches="two"), merged(patches="both"))
    assert "LoRAs can't be told" in caplog.text


def test_the_same_model_in_other_bits_is_a_reference(caplog):
    caplog.set_level(logging.WARNING)
    check_reference(source(), source(provenance=KNOWN))
    assert not caplog.text
    check_reference(source(), source(provenance={"model": "full"}))
    assert "can't be told: the reference has no source_hash" in caplog.text
