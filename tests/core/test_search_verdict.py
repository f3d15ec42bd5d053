"""What a whole calibration says of its gain: it does not fool itself."""

from __future__ import annotations

import random

import pytest
from planted import Planted
from search_cases import PROMPTS, World, run

from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.prompts import CalibrationPrompts
from qsched_core.search import CalibrationSettings

pytest.importorskip("optuna", reason="the search needs optuna")


def test_a_gain_that_does_not_carry_over_is_called_overfitted_and_kept_out(tmp_path):
    world = World(heldout_best=ScalarCorrection.identity(4))
    result = run(world, tmp_path)
    assert result.verdict.kind == "overfitted"
    assert result.schedule.is_identity and result.heldout.high < 0 < result.calibration.low
    unguarded = run(world, tmp_path, CalibrationSettings("grid", 16, guard=False))
    assert unguarded.schedule.candidate == unguarded.best != result.schedule.candidate
    assert unguarded.verdict.kind == "overfitted"


def test_a_model_that_is_best_as_it_is_keeps_1(tmp_path):
    ones = ScalarCorrection.identity(4)
    world = World(ones)
    result = run(world, tmp_path)
    assert result.verdict.kind == "no effect" and result.schedule.is_identity
    assert world.calls[-1] == 1  # there is no other winner to be judged


def test_a_scorer_that_sees_nothing_is_reported(tmp_path):
    def constant(corrections, prompts):
        ones = (1.0,) * len(prompts)
        return [Scores(ones, ones, ones)] * len(corrections)

    result = run(Planted(constant), tmp_path)
    assert result.schedule.is_identity
    assert any("every candidate scored the same" in warning for warning in result.warnings)


def test_an_optimum_outside_the_box_is_reported(tmp_path):
    far = ScalarCorrection((1.9, 1.6, 1.3, 1.0), (1.0,) * 4)
    assert any("edge" in warning for warning in run(World(far), tmp_path).warnings)


def test_pure_noise_rarely_passes_the_guard(tmp_path):
    passed = 0
    for seed in range(60):
        prompts = CalibrationPrompts.of(
            PROMPTS.calibration.prompts, PROMPTS.heldout.prompts, 1000 + seed
        )

        def noise(corrections, members):
            rows = [
                tuple(random.Random(f"{c}{s}").gauss(0, 1) for s in members.seeds)
                for c in corrections
            ]
            return [Scores(row, row, row) for row in rows]

        settings = CalibrationSettings("grid", 4)
        passed += not run(Planted(noise), tmp_path, settings, prompts).schedule.is_identity
    assert passed <= 0.05 * 60
