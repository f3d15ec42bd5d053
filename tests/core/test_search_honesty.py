"""Control, pre-check and cautions: what tells repair from a number that went up."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_cases import PROMPTS, World, run

from qsched_core.calibration import precheck
from qsched_core.calibration.precheck import compared
from qsched_core.calibration.report import report_text
from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.search import CalibrationSettings
from qsched_core.study import CalibrationError
from qsched_core.trajectory import Observed

SETTINGS = CalibrationSettings("grid", 16, high=1.2)
ONES = ScalarCorrection.identity(4)


LEVELS = (1.0, 0.7, 0.4, 0.0)


def tensors(seed, prompts=8, steps=3):
    draw = torch.Generator().manual_seed(seed)
    shape = (steps, prompts, 4, 8, 8)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3)]


class Seen(World):
    """A world whose model can be looked at: noise, and how often it was."""

    def __init__(self, *args, error=0.0, **more):
        super().__init__(*args, **more)
        self.error, self.looks = error, []

    def observed(self, prompts, at=None, trajectory=None, **told):
        self.looks.append(list(self.calls))
        count = self.trajectory.steps
        x, exact, noise = (tuple(t) for t in tensors(2, len(prompts), count))
        outputs = tuple(e + self.error * n for e, n in zip(exact, noise, strict=True))
        self.nfe += count * len(prompts)
        return Observed(self.trajectory.sigmas[:-1], x, outputs, count * len(prompts))


def controlled(reference, folder, world=None):
    return run(world or Seen(error=0.1), folder, SETTINGS, reference=reference)


# Control


def test_a_reference_that_is_best_as_it_is_shows_repair(tmp_path):
    result = controlled(Seen(ONES, model={"m": "full"}), tmp_path)
    control = result.control
    assert control.kind == "repair" and control.gain.high < 0 < control.repair.low
    assert control.repair.mean == pytest.approx(result.heldout.mean - control.gain.mean)
    assert control.lost.mean > 0  # at c = 1 the reference scores higher
    assert control.text in report_text(result)
    provenance = result.schedule.provenance
    assert provenance["control"]["kind"] == "repair"
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_reference_that_gains_as_much_shows_sharpening(tmp_path):
    control = controlled(Seen(model={"m": "full"}), tmp_path).control
    assert control.kind == "sharpening"
    assert control.repair.mean == pytest.approx(0, abs=1e-9) and "no repair" in control.text


def test_the_control_is_made_once_and_costs_are_counted(tmp_path):
    first, world = Seen(ONES), Seen(error=0.1)
    one = controlled(first, tmp_path, world)
    assert first.calls == [2] and one.nfe == first.nfe + world.nfe
    again = Seen(ONES)
    assert controlled(again, tmp_path).control == one.control
    assert again.calls == []
    other = Seen(ONES, model={"m": 2})
    controlled(other, tmp_path)  # another reference is another control
    assert other.calls == [2]


def test_without_a_winner_or_a_reference_there_is_no_control(tmp_path):
    assert controlled(Seen(), tmp_path, Seen(ONES)).control is None
    assert run(World(), tmp_path / "none").control is None


# Pre-check


@given(st.integers(0, 99), st.floats(0.8, 1.2), st.floats(-0.2, 0.2))
def test_an_error_that_scalars_make_is_removed_whole(seed, a, b):
    """The quantized velocity is the reference's, scaled and with a part of x."""
    x, exact, _ = tensors(seed)
    velocity = x - exact
    ours = x - (a * velocity + b * x)
    found = precheck(list(x), list(ours), list(exact), LEVELS)
    if abs(a - 1) + abs(b) > 1e-3:
        assert found.total == pytest.approx(1, abs=1e-6)
        assert found.steps == pytest.approx((1, 1, 1), abs=1e-6)


@given(st.integers(0, 99))
def test_an_error_of_pure_noise_is_not_removed(seed):
    x, exact, noise = tensors(seed, prompts=32)
    found = precheck(list(x), list(exact + 0.1 * noise), list(exact), LEVELS)
    # the best factor of a velocity with 1 % of noise is all but 1: there is next to nothing to gain
    assert -0.05 < found.total < 0.05
    assert found.error == pytest.approx((0.1,) * 3, rel=0.15)


def test_the_least_squares_is_the_correction_that_the_sampler_applies():
    """The share is that of corrected Euler steps, with the scalars found on the other half."""
    x, exact, noise = tensors(5)
    ours = exact * 1.1 + 0.05 * noise
    left, energy = 0.0, 0.0
    for i, (sigma, after) in enumerate(pairwise(LEVELS)):
        rate = (after - sigma) / sigma
        target = x[i] + rate * (x[i] - exact[i])
        plain = x[i] + rate * (x[i] - ours[i])
        energy += float((plain - target).square().sum())
        for fit, judge in (
            (slice(0, None, 2), slice(1, None, 2)),
            (slice(1, None, 2), slice(0, None, 2)),
        ):
            columns = torch.stack([x[i, fit].flatten(), rate * (x[i] - ours[i])[fit].flatten()], 1)
            normal = columns.T @ columns
            c = torch.linalg.solve(normal, columns.T @ target[fit].flatten())
            step = c[0] * x[i, judge] + rate * c[1] * (x[i] - ours[i])[judge]
            left += float((step - target[judge]).square().sum())
    found = precheck(list(x), list(ours), list(exact), LEVELS)
    assert found.total == pytest.approx(1 - left / energy, abs=1e-9)
    assert found.nfe == 2 * 3 * 8


def test_equal_models_have_nothing_to_remove():
    x, exact, _ = tensors(1)
    found = precheck(list(x), list(exact), list(exact), LEVELS)
    assert found.total == 0 and found.error == (0, 0, 0)


@pytest.mark.parametrize("prompts", [1, 8])
def test_what_does_not_fit_is_told(prompts):
    x, exact, _ = tensors(1, prompts)
    with pytest.raises(ValueError, match="steps; give one of each" if prompts > 1 else "2 prompts"):
        precheck(list(x), list(exact), list(exact), LEVELS[: 3 if prompts > 1 else 4])


def test_the_pre_check_is_made_once_before_the_search(tmp_path):
    world, later = Seen(error=0.1), Seen(error=0.1)
    first = controlled(Seen(ONES), tmp_path, world)
    again = controlled(Seen(ONES), tmp_path, later)
    assert world.looks == [[]] and later.looks == []
    assert first.precheck == again.precheck
    assert first.precheck.text in report_text(first)
    assert first.schedule.provenance["precheck"]["prompts"] == 8


class Curved(ScalarCorrection):
    """A kind of correction that no least squares can fit."""

    kind = "curved"

    @staticmethod
    def euler_basis(x, denoised, sigma, sigma_next):
        return None


def test_a_correction_that_is_not_linear_has_no_pre_check_and_costs_nothing(caplog):
    caplog.set_level("INFO")
    world, reference = Seen(error=0.1), Seen()
    assert compared(world, reference, PROMPTS.calibration, Curved) is None
    assert "no pre-check: a correction of kind curved" in caplog.text
    assert world.nfe == reference.nfe == 0
    assert compared(world, reference, PROMPTS.calibration).prompts == 8
    x, exact, _ = tensors(1)
    with pytest.raises(ValueError, match="kind 'curved' has no least-squares fit"):
        precheck(list(x), list(exact), list(exact), LEVELS, correction=Curved)


# Cautions


class Terms(World):
    """JAQ from two parts, each moving with the first coefficient as told."""

    def __init__(self, alignment, quality, k=2.0):
        super().__init__()
        self.slopes, self.k = (alignment, quality), k

    def score(self, correction, best, prompts):
        moved = correction.c_x[0] - 1
        alignment = [
            4 + s % 89 / 890 + (self.slopes[0] + s % 7 / 70) * moved for s in prompts.seeds
        ]
        quality = [0.5 + self.slopes[1] * moved for _ in prompts.seeds]
        jaq = [a + self.k * q for a, q in zip(alignment, quality, strict=True)]
        return Scores(alignment, quality, jaq)


def warned(world, folder, **more):
    return "\n".join(run(world, folder, SETTINGS, **more).warnings)


def test_a_gain_of_both_terms_is_not_warned_of(tmp_path):
    text = warned(Terms(1.0, 0.2), tmp_path)
    assert "quality term" not in text and "leave" not in text


def test_a_gain_that_is_all_quality_is_told_with_its_share(tmp_path):
    text = warned(Terms(0.1, 1.0), tmp_path)
    assert "of the calibration gain" in text and "% of" in text and "lower quality_weight" in text
    assert "quality alone decides" in text


def test_pictures_that_leave_their_prompts_are_told(tmp_path):
    text = warned(Terms(-1.0, 2.0), tmp_path)
    assert "leave their prompts" in text
    assert "held-out pictures lost more" not in text
    assert "lost more than 0.35 of alignment" in warned(Terms(-3.0, 4.0), tmp_path / "far")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_liar_is_named_with_the_trial_and_the_others_are_kept(value, tmp_path):
    class Liar(World):
        def score(self, correction, best, prompts):
            if len(self.calls) == 7:
                row = (value,) * len(prompts)
                return Scores(row, row, row)
            return super().score(correction, best, prompts)

    settings = CalibrationSettings("gp", 12, together=1)
    with pytest.raises(
        CalibrationError, match=r"trial 7 of 13 failed.*6 trials before it are kept"
    ):
        run(Liar(), tmp_path, settings)
    assert run(World(), tmp_path, settings).new_trials == 7


def test_a_model_that_fails_is_named_with_the_trial_and_goes_on(tmp_path):
    class Failing(World):
        def __call__(self, corrections, prompts):
            if len(self.calls) == 6:
                raise RuntimeError("device lost")
            return super().__call__(corrections, prompts)

    settings = CalibrationSettings("gp", 12, together=1)
    with pytest.raises(CalibrationError, match="trial 7 of 13 failed: device lost"):
        run(Failing(), tmp_path, settings)
    assert run(World(), tmp_path, settings).new_trials == 7


def test_an_inverted_scorer_helps_itself_and_is_not_hidden(tmp_path):
    """Nothing can know that a scorer is wrong: its own numbers are what is reported."""

    class Inverted(World):
        def score(self, correction, best, prompts):
            right = super().score(correction, best, prompts)
            return Scores(
                *(tuple(-v for v in row) for row in (right.alignment, right.quality, right.jaq))
            )

    result = run(Inverted(), tmp_path, SETTINGS)
    assert result.winner.value == max(t.value for t in result.trials)
    assert any("edge" in warning for warning in result.warnings)


# Pruners


@pytest.mark.parametrize("pruner", ["wilcoxon", "hyperband"])
def test_bad_candidates_do_not_see_every_prompt(pruner, tmp_path):
    settings = CalibrationSettings("gp", 20, pruner=pruner)
    world, full = World(noise=0.01), World(noise=0.01)
    result = run(world, tmp_path, settings)
    whole = run(full, tmp_path / "full", CalibrationSettings("gp", 20))
    pruned = [t for t in result.trials if t.pruned]
    assert pruned and not result.trials[0].pruned and not result.winner.pruned
    assert all(len(t.scores) < len(PROMPTS.calibration) for t in pruned)
    assert result.heldout.low > 0
    seen = sum(len(t.scores) for t in result.trials)
    assert seen < sum(len(t.scores) for t in whole.trials)
    worst_kept = min(t.value for t in result.trials if not t.pruned)
    assert sum(t.value for t in pruned) / len(pruned) < result.winner.value and worst_kept > 0
    assert run(World(), tmp_path, settings).new_trials == 0  # what is kept is read back alike
