"""The report: text with the numbers, a picture for any number of steps, trials and samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsched_core.calibration import CalibrationResult, Control, PreCheck
from qsched_core.calibration.guard import judge
from qsched_core.calibration.report import (
    Sample,
    report_path,
    report_picture,
    report_text,
    typical,
    verdict_text,
)
from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.prompts import PromptSet
from qsched_core.schedule import QSchedule
from qsched_core.search import Trial, best_of
from qsched_core.statistics import paired_interval
from qsched_core.trajectory import Candidate, Trajectory


def scores(mean, n=8):
    values = [mean + 0.01 * i for i in range(n)]
    return Scores([v - 1 for v in values], [0.5] * n, values)


def result(steps=4, values=(5.0, 4.0, 5.2), guard=True, heldout_gain=0.1):
    rng = np.random.default_rng(0)
    trials, trajectory = [], Trajectory.of([1 - i / steps for i in range(steps + 1)])
    for number, value in enumerate(values):
        c = np.ones((2, steps)) if number == 0 else rng.uniform(0.85, 1.15, (2, steps))
        correction = ScalarCorrection(*(tuple(map(float, row)) for row in c))
        candidate = Candidate(trajectory, correction)
        trials.append(Trial(number, "ramp", candidate, scores(value), value, 1.5, 60))
    winner = best_of(trials)
    before, after = scores(5.0), scores(5.0 + heldout_gain)
    gains = [None, None]
    if winner is not trials[0]:
        gains = [
            paired_interval(trials[0].scores.jaq, winner.scores.jaq),
            paired_interval(before.jaq, after.jaq),
        ]
    return CalibrationResult(
        schedule=QSchedule.identity(trajectory),
        best=winner.candidate,
        verdict=judge(*gains, guard),
        trials=tuple(trials),
        calibration=gains[0],
        heldout=gains[1],
        heldout_before=before,
        heldout_after=after,
        warnings=("look out",),
        nfe=180,
        seconds=4.5,
        journal=Path("study.journal"),
        where="study.journal",
        new_trials=2,
    )


def samples(count):
    pictures = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
    return [Sample(f"a long prompt about {i} " * 9, 0.1 - i, *pictures) for i in range(count)]


def test_the_text_has_verdict_scores_coefficients_warnings_and_cost():
    made = result()
    text = report_text(made)
    assert text.startswith(made.verdict.text)
    for part in ("calibration jaq", "held-out quality", "warning: look out", "step 4: c_x"):
        assert part in text
    assert "3 trials (1 not made in this run), 180 model evaluations (NFE)" in text
    assert f"{made.best.correction.c_x[2]:.4f}" in text


def test_what_the_guard_refused_is_said_to_be_unused():
    assert "not used: the guard keeps c = 1" in report_text(result(heldout_gain=-0.1))
    assert "not used" not in report_text(result())
    assert "best coefficients" not in report_text(result(values=(5.0, 4.0)))


@pytest.mark.parametrize("steps", [1, 2, 4, 16, 40])
@pytest.mark.parametrize("values", [(5.0,), (5.0, 5.0), (5.0, -3.0, 5.1, 5.05)])
def test_a_picture_shows_its_numbers_for_any_size(steps, values):
    made = result(steps, values)
    picture = report_picture(made)
    assert picture.mode == "RGB" and picture.width == 1024
    pixels = np.asarray(picture).astype(int)
    ground = pixels[0, 0]
    for edge in (pixels[:, :12], pixels[:, -12:], pixels[:12], pixels[-4:]):
        assert (edge == ground).all(), "something is cut off"
    best = made.best.correction
    other = best.with_rows({"c_x": tuple(c + 0.05 for c in best.c_x)})
    moved = replace(made.trials[-1], value=made.trials[-1].value - 0.02)
    for changed_result in (
        replace(made, best=replace(made.best, correction=other)),
        replace(made, trials=(*made.trials[:-1], moved)),
        replace(made, verdict=replace(made.verdict, text="something else: told at length")),
    ):
        changed = np.asarray(report_picture(changed_result))
        assert changed.shape != pixels.shape or (changed != pixels).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_samples_pictures_are_in_it(count):
    plain, full = report_picture(result()), report_picture(result(), samples(count))
    assert full.height > plain.height
    pixels = np.asarray(full).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).sum() >= 1000


def test_typical_samples_are_the_worst_the_median_and_the_best():
    assert typical([0.3, -0.2, 0.1, 0.9, 0.0]) == [1, 2, 3]
    assert typical([0.3, 0.1]) == [1, 0]
    assert typical([0.3]) == [0]


def test_a_kept_picture_is_found_again_by_what_it_shows_alone():
    """Other held-out prompts, seeds or another reference make another picture of one journal."""
    made = result()
    prompts = PromptSet(tuple(f"thing {i}" for i in range(8)), tuple(range(8)))
    before = (scores(5.0), scores(5.1))
    controls = [Control.of(scores(5.0 + e), scores(5.1), before) for e in (0.0, 0.05)]
    checks = [PreCheck((share,), share, (0.2,), 8, 16) for share in (0.1, 0.4)]
    shown = [
        (made, prompts),
        (made, PromptSet(prompts.prompts, tuple(range(8, 16)))),
        (made, PromptSet(tuple(f"other {i}" for i in range(8)), prompts.seeds)),
        (result(heldout_gain=0.2), prompts),
        (result(guard=False, heldout_gain=-0.1), prompts),
        (result(guard=True, heldout_gain=-0.1), prompts),
        (result(values=(5.0, 4.5, 5.2)), prompts),
        *((replace(made, control=control), prompts) for control in controls),
        *((replace(made, precheck=check), prompts) for check in checks),
    ]
    shown.append((replace(made, warnings=()), prompts))
    paths = [report_path(*each) for each in shown]
    assert len(set(paths)) == len(shown)
    assert all(path.name.startswith("study.") and path.suffix == ".png" for path in paths)
    again = replace(result(), new_trials=0, seconds=9.0)  # the same study, taken up again
    assert report_path(again, PromptSet(prompts.prompts, prompts.seeds)) == paths[0]


def test_every_warning_stands_beside_the_verdict():
    made = replace(result(heldout_gain=0.2), warnings=("look out", "mind the gap"))
    lines = verdict_text(made).splitlines()
    assert lines[0].startswith("helps, with 2 warnings")
    assert lines[1].startswith("helps: held-out gain")
    assert lines[2:] == ["Warning: look out.", "Warning: mind the gap."]
    assert verdict_text(replace(made, warnings=())).splitlines() == lines[1:2]
