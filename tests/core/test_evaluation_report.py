"""The report of an evaluation: every number in text and CSV, every arm's pictures in the picture."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from evaluation_cases import PaintSource, evaluated, three_arms

from qsched_core.evaluation.picture import report_picture
from qsched_core.evaluation.table import images_csv, report_text, summary_csv


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluated(folder, baseline="baseline", references=torch.rand(6, 8, 12, 3))


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_text_has_verdicts_means_gains_distances_and_cost(made):
    text = report_text(made)
    gain = made.comparison("baseline", "quantized").gains["jaq"]
    assert text.startswith(f"quantized (int2) against baseline: worse, JAQ {gain}")
    assert (
        f"int2 + schedule against quantized (int2): better, JAQ {made.comparisons[2].gains['jaq']}"
        in text
    )
    for arm in made.arms:
        for value in arm.scores.means().values():
            assert f"{value:.4f} [" in text
    for distance in made.distances:
        assert (
            f"{round(distance.value, 9):.5g} ({distance.images} and {distance.against_images} images)"
            in text
        )
    assert len(made.changes) == 1 + 3
    assert "int2 + schedule is nearer to baseline than quantized (int2) (pixels): -0." in text
    assert "note: pixels: 6 images are few" in text
    assert "30 images (0 from earlier runs), 80 model evaluations (NFE)" in text


def test_arms_that_don_t_differ_are_said_not_to(tmp_path):
    arms = three_arms()[1:]
    arms[1] = type(arms[0])("schedule", arms[0].source, arms[0].candidate)
    text = report_text(evaluated(tmp_path, arms))
    assert "no difference that can be told from chance" in text


def test_the_csv_has_every_score_of_every_image(made):
    rows = read(images_csv(made))
    assert len(rows) == 30
    for row in rows:
        arm, index = made[row["arm"]], int(row["number"]) - 1
        assert row["prompt"] == made.prompts.prompts[index]
        assert int(row["seed"]) == made.prompts.seeds[index]
        for name, values in arm.columns.items():
            assert float(row[name]) == values[index]


def test_the_summary_has_every_mean_gain_and_distance(made):
    rows = {(r["quantity"], r["arm"], r["against"]): r for r in read(summary_csv(made))}
    assert len(rows) == 3 * 4 + 3 * 4 + len(made.distances) + len(made.changes)
    gain = made.comparison("quantized", "schedule").gains["alignment"]
    row = rows["gain alignment", "schedule", "quantized"]
    assert [float(row[k]) for k in ("value", "low", "high")] == [gain.mean, gain.low, gain.high]
    assert float(rows["mean jaq", "baseline", ""]["value"]) == pytest.approx(
        made["baseline"].scores.mean()
    )
    distance = made.distances[0]
    assert float(rows["frechet pixels", "quantized", "baseline"]["value"]) == distance.value


@pytest.mark.parametrize("arms", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_picture_shows_its_numbers_for_any_number_of_arms_and_prompts(tmp_path, arms, count):
    picture = report_picture(evaluated(tmp_path, three_arms()[:arms], count))
    assert picture.mode == "RGB" and picture.width == 1200
    pixels = np.asarray(picture).astype(int)
    for edge in (pixels[:, :12], pixels[:, -12:], pixels[:12], pixels[-4:]):
        assert (edge == pixels[0, 0]).all(), "something is cut off"
    darker = three_arms(PaintSource(0.15), PaintSource(0.05))[:arms]
    changed = np.asarray(report_picture(evaluated(tmp_path / "darker", darker, count)))
    assert changed.shape != pixels.shape or (changed != pixels).any()


def test_pictures_of_every_arm_are_in_it(tmp_path):
    class Flat(PaintSource):
        def images(self, prompts, corrections, on_step=None):
            made = super().images(prompts, corrections, on_step)
            return torch.zeros_like(made) + torch.tensor([self.light, 0, 1])

    arms = three_arms(Flat(0.0, model="full"), Flat(1.0))
    pixels = np.asarray(report_picture(evaluated(tmp_path, arms))).reshape(-1, 3)
    for color, least in (((0, 0, 255), 10_000), ((255, 0, 255), 20_000)):
        assert (pixels == color).all(1).sum() > least
