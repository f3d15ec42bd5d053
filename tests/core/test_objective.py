"""JAQ: the published formula, one definition, and scorers that misbehave."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.objective import Objective, Scores, recipe_of
from qsched_core.scorers import ScorerError

finite = st.floats(-1e6, 1e6)
scores = st.integers(1, 6).flatmap(
    lambda n: st.builds(
        Scores,
        *[st.lists(finite, min_size=n, max_size=n)] * 3,
        st.fixed_dictionaries({"clip_score": st.lists(finite, min_size=n, max_size=n)}),
    )
)


class StandInEncoder:
    """Cosine is the image's red, quality follows its green."""

    logit_scale = 1.0

    def encode_images(self, images):
        red, green = images[:, 0, 0, 0], images[:, 0, 0, 1]
        return torch.stack([red, green], 1)

    def encode_texts(self, texts):
        features = {"Good photo.": (0.0, 1.0), "Bad photo.": (0.0, 0.0)}
        return torch.tensor([features.get(text, (1.0, 0.0)) for text in texts])

    def describe(self):
        return {"file": "stand-in"}


def images_of(*pixels):
    out = torch.zeros(len(pixels), 4, 4, 3)
    for image, (red, green) in zip(out, pixels, strict=True):
        image[..., 0], image[..., 1] = red, green
    return out


@given(st.floats(0.011, 1), st.floats(0, 1), st.floats(0, 5))
def test_jaq_is_log_clip_score_plus_k_quality(red, green, k):
    result = Objective(StandInEncoder(), quality_weight=k).score(images_of((red, green)), ["x"])
    quality = 1 / (1 + math.exp(-green))
    assert result.alignment[0] == pytest.approx(math.log(100 * red), abs=1e-5)
    assert result.quality[0] == pytest.approx(quality, abs=1e-6)
    assert result.jaq[0] == pytest.approx(result.alignment[0] + k * result.quality[0])
    assert result.terms["clip_score"][0] == pytest.approx(100 * red, rel=1e-5)


@pytest.mark.parametrize("red", [0.01, 0.0, -0.7])
def test_an_image_that_has_nothing_of_its_prompt_scores_the_floor(red):
    result = Objective(StandInEncoder()).score(images_of((red, 0.5)), ["x"])
    assert result.alignment[0] == pytest.approx(0, abs=1e-6)


def test_better_alignment_and_better_quality_both_raise_jaq():
    jaq = (
        Objective(StandInEncoder())
        .score(images_of((0.2, 0.2), (0.3, 0.2), (0.2, 0.3)), ["x"] * 3)
        .jaq
    )
    assert jaq[1] > jaq[0] and jaq[2] > jaq[0]


@pytest.mark.parametrize("k", [-1, math.nan, math.inf])
def test_an_unusable_weight_is_told(k):
    with pytest.raises(ScorerError, match="quality_weight="):
        Objective(StandInEncoder(), quality_weight=k)


class Liar:
    name = "liar"

    def __init__(self, output):
        self.output = output

    def score(self, batch):
        return self.output

    def describe(self):
        return {"name": self.name}


@pytest.mark.parametrize(
    "output,reason",
    [
        (torch.tensor([0.1, math.nan]), "liar gave nan for prompt 'b'"),
        (torch.tensor([math.inf, 0.1]), "liar gave inf for prompt 'a'"),
        (torch.tensor([0.1]), "shape"),
    ],
)
@pytest.mark.parametrize("term", ["alignment", "quality"])
def test_a_scorer_that_gives_no_numbers_is_named(output, reason, term):
    objective = Objective(StandInEncoder())
    setattr(objective, term, [(1.0, Liar(output))])
    with pytest.raises(ScorerError, match=reason):
        objective.score(images_of((0.2, 0.2), (0.3, 0.2)), ["a", "b"])


def test_a_scorer_that_can_not_tell_images_apart_is_warned_of(caplog):
    objective = Objective(StandInEncoder())
    objective.quality = [(1.0, Liar(torch.full((2,), 0.5)))]
    with caplog.at_level(logging.WARNING):
        objective.score(images_of((0.2, 0.2), (0.3, 0.2)), ["a", "b"])
    assert "liar gave 2 images the same score" in caplog.text


@pytest.mark.parametrize(
    ("formula", "alignment", "quality", "k"),
    [
        ("", "clip", "clip_iqa", 3.0),
        ("clip+clipiqa", "clip", "clip_iqa", 3.0),
        ("aq+hps", "aq", "hps", 3.0),
        ("clip + 2*clip_iqa", "clip", "2.0*clip_iqa", 1.0),
        ("0.5*aq + clip+0.1*hps + aesthetic", "0.5*aq clip", "0.1*hps aesthetic", 1.0),
    ],
)
def test_presets_and_sums_are_read(formula, alignment, quality, k):
    recipe = recipe_of(formula, quality_weight=3.0)

    def said(terms):
        return " ".join(t.spec if t.weight == 1 else f"{t.weight}*{t.spec}" for t in terms)

    assert (said(recipe.alignment), said(recipe.quality)) == (alignment, quality)
    assert recipe.quality_weight == k


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        ("beauty", "formula='beauty' is unknown; choose one of clip, aq"),
        ("clip + ", "'' is no term"),
        ("clip + x*clip_iqa", r"'x\*clip_iqa' is no term"),
        ("clip - clip_iqa", "is unknown"),
        ("clip + -1*clip_iqa", "weight -1.0 of 'clip_iqa' must be above 0"),
        ("clip + nan*clip_iqa", "weight nan"),
        ("clip_iqa", "no term that looks at the prompt"),
        ("clip + clip_iqa + 2*clip_iqa", "has 'clip_iqa' twice"),
        ("clip:x + clip_iqa", "clip takes no option"),
        ("__import__('os')", "is unknown"),
    ],
)
def test_a_formula_that_is_none_is_told(formula, says):
    with pytest.raises(ScorerError, match=says):
        recipe_of(formula)


@given(st.floats(0.011, 1), st.floats(0, 1), st.floats(0.1, 5))
def test_a_weighted_sum_is_that_sum(red, green, weight):
    """With the same weights it is the preset, and every term is reported."""
    image = images_of((red, green))
    preset = Objective(StandInEncoder(), quality_weight=weight).score(image, ["x"])
    summed = Objective(StandInEncoder(), formula=f"clip + {weight}*clip_iqa").score(image, ["x"])
    assert summed.jaq == pytest.approx(preset.jaq) and summed.terms == preset.terms
    assert summed.jaq[0] == pytest.approx(summed.alignment[0] + summed.quality[0])
    twice = Objective(StandInEncoder(), formula="2*clip + aq").score(image, ["x"])
    assert twice.jaq[0] == pytest.approx(2 * preset.alignment[0] + twice.terms["aq"][0])


def test_a_scorer_with_weights_of_its_own_names_what_is_missing(tmp_path):
    with pytest.raises(ScorerError, match=r"'hps' needs its weights.*choose it as hps_name"):
        Objective(StandInEncoder(), formula="aq+hps")
    with pytest.raises(ScorerError, match=r"hps_name: .*none\.pt does not exist"):
        Objective(StandInEncoder(), formula="aq+hps", files={"hps": tmp_path / "none.pt"})


def test_the_description_is_plain_json_and_tells_objectives_apart():
    one, two = Objective(StandInEncoder()), Objective(StandInEncoder(), quality_weight=1)
    assert json.loads(json.dumps(one.describe())) == one.describe()
    assert one.describe() != two.describe()
    assert one.describe() == Objective(StandInEncoder()).describe()
    assert one.describe()["preset"] == one.preset == "clip+clipiqa"


@given(scores)
def test_scores_survive_json_exactly(value):
    assert Scores.from_dict(json.loads(json.dumps(value.to_dict()))) == value


@given(st.lists(scores, min_size=1, max_size=4))
def test_joined_scores_are_the_parts_in_order(parts):
    joined = Scores.join(parts)
    assert joined.jaq == tuple(v for part in parts for v in part.jaq)
    assert joined.terms["clip_score"] == tuple(v for p in parts for v in p.terms["clip_score"])
    assert joined.mean() == pytest.approx(sum(joined.jaq) / len(joined))


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ScorerError, match="jaq of image 2 of 2 is nan"):
        Scores((1.0, 1.0), (1.0, 1.0), (1.0, math.nan))
    with pytest.raises(ScorerError, match="quality has 1 scores but alignment 2"):
        Scores((1.0, 1.0), (1.0,), (1.0, 1.0))
