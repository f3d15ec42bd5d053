"""The picture and the summary of a schedule: every number is there, whatever the schedule holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import RAMPED, plain, scalar_schedule, schedules

from qsched_core.canvas import INK, PAPER
from qsched_core.schedule import QSchedule
from qsched_core.schedule.chart import CURVES, draw
from qsched_core.schedule.summary import provenance_rows, scores, summary
from qsched_core.trajectory import StepSolver, Trajectory

PROVENANCE = {
    "source": "calibration",
    "model": {"source": "demo.safetensors", "format": "int2", "backend": "torch cpu"},
    "sampling": {"width": 96, "height": 64, "cfg": 1.0},
    "objective": {"preset": "clip"},
    "search": {"strategy": "gp", "trials": 25},
    "prompts": {"calibration": {"count": 20}, "heldout": {"count": 64}},
    "scores": {
        "calibration": [{"jaq": 4.5}, {"jaq": 4.7}],
        "heldout": [{"jaq": 4.48}, {"jaq": 4.59}],
        "calibration_gain": {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 20},
        "heldout_gain": None,
    },
    "verdict": "helps",
    "guarded": False,
    "nfe": 2416,
    "seconds": 34.0,
}
LEARNED = QSchedule(RAMPED.trajectory, RAMPED.correction, PROVENANCE)


def test_the_summary_tells_what_was_learned_for_what():
    text = summary(LEARNED)
    for told in (
        "step 3: sigma 0.7500  c_x 1.2000  c_eps 0.7000",
        "origin: learned, search gp, 25 trials",
        "model: demo.safetensors",
        "weights: int2",
        "runs on: torch cpu",
        "sampled at: 96 x 64, cfg 1",
        "calibration, 20 prompts: JAQ 4.5000 -> 4.7000 (+0.2000, 95 % of it in +0.1000 to +0.3000)",
        "held-out, 64 prompts: JAQ 4.4800 -> 4.5900 (+0.1100)",
        "verdict: helps",
        "cost: 2416 model evaluations (NFE), 34 s",
    ):
        assert told in text


def test_an_edited_schedule_shows_no_scores_but_its_edits():
    edited = LEARNED.edited({"c_x": 0.01}, 2).edited({"c_eps": 1.01}, 0, "multiply")
    assert scores(edited) == []
    told = dict(provenance_rows(edited))
    assert told["origin"] == "edited by hand (step 2 c_x +0.01; all steps c_eps x 1.01)"
    assert told["verdict"] == "not measured since it was edited (the original: helps)"
    assert told["model"] == "demo.safetensors"
    assert edited.original.correction == LEARNED.correction
    assert LEARNED.original is None


def test_a_guarded_schedule_says_whose_scores_are_shown():
    guarded = QSchedule.identity(
        RAMPED.trajectory, **PROVENANCE | {"guarded": True, "verdict": "overfitted"}
    )
    assert "the scores are those of the best candidate" in dict(provenance_rows(guarded))["verdict"]


def _luminance(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [INK, *CURVES])
def test_text_and_curves_stand_out_from_the_ground(color):
    assert (_luminance(PAPER) + 0.05) / (_luminance(color) + 0.05) >= 4.5


EDGES = scalar_schedule([1 - i / 16 for i in range(17)], [0.25, 4.0] * 8, [4.0, 0.25] * 8)


@pytest.mark.parametrize(
    "schedule",
    [
        RAMPED,
        LEARNED,
        LEARNED.edited({"c_x": 0.02}, 1),
        QSchedule.identity(RAMPED.trajectory),
        scalar_schedule((1.0, 0.0), (1.03,), (0.95,)).edited({"c_x": 0.01}, 1),
        EDGES,
        scalar_schedule([1 - i / 1000 for i in range(1001)], [1.0] * 1000, [0.5] * 1000),
    ],
    ids=["ramp", "learned", "edited", "identity", "1-step", "16-steps-at-the-limits", "1000-steps"],
)
def test_the_picture_is_opaque_and_nothing_is_cut_off(schedule):
    picture = draw(schedule)
    assert picture.mode == "RGB"
    assert picture.width == 1200
    pixels = np.asarray(picture).astype(int)
    ground = np.array([int(PAPER[k : k + 2], 16) for k in (1, 3, 5)])
    margin = np.concatenate(
        [pixels[2:-2, 2:20].reshape(-1, 3), pixels[2:-2, -20:-2].reshape(-1, 3)]
    )
    margin = np.concatenate([margin, pixels[2:20, 2:-2].reshape(-1, 3)])
    assert (np.abs(margin - ground) <= 2).all()
    used = (np.abs(pixels - ground) > 60).any(axis=(1, 2)).nonzero()[0]
    assert used.max() < picture.height - 15
    for color in CURVES[:2]:
        exact = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
        assert (np.abs(pixels - exact).max(axis=2) <= 8).sum() > 50


keys = st.sampled_from([*PROVENANCE, "edits", "original", "jaq", "low", "c_x", "provenance"])


@given(
    schedules(apart=0.02, most=40),
    st.dictionaries(keys, plain | st.dictionaries(keys, plain) | st.just(PROVENANCE["scores"])),
    st.sampled_from(["calibration", "edit", "ramp", ""]),
)
@settings(max_examples=25)
def test_any_provenance_is_drawn(schedule, found, source):
    odd = QSchedule(schedule.trajectory, schedule.correction, found | {"source": source})
    assert draw(odd).height < 3000
    assert summary(odd).encode()


def test_a_schedule_of_several_solvers_has_a_row_for_their_names():
    base = QSchedule.identity(Trajectory.of((1.0, 0.5, 0.2, 0.0)))
    names = (StepSolver("euler"), StepSolver("dpm_2m"), StepSolver("euler"))
    mixed = QSchedule.identity(Trajectory(base.sigmas, True, names))
    assert draw(mixed).height > draw(base).height
    assert "dpm_2m" in summary(mixed)


def test_learned_noise_levels_are_told_with_those_they_replaced():
    before = {"sampling": {"sigmas": [1.0, 0.7, 0.3, 0.0]}}
    trajectory = Trajectory.of((1.0, 0.5, 0.2, 0.0))
    learned = QSchedule.identity(trajectory, **before)
    assert ("levels", "noise levels learned, in place of 1, 0.7, 0.3, 0") in provenance_rows(
        learned
    )
    for kept in (
        {"sampling": {"sigmas": [1.0, 0.5001, 0.2, 0.0]}},
        {"sampling": {"sigmas": "x"}},
        {},
    ):
        schedule = QSchedule.identity(trajectory, **kept)
        assert schedule.replaced_sigmas is None
        assert "levels" not in dict(provenance_rows(schedule))
