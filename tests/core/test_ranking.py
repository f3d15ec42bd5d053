"""Search by rankings: the published estimator, the rounds, and the study of a person's rankings."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_cases import World, run

from qsched_core.calibration.beside import beside
from qsched_core.correction import ScalarCorrection
from qsched_core.objective import Scores
from qsched_core.prompts import PromptSet
from qsched_core.schedule import QSchedule
from qsched_core.schedule.summary import provenance_rows
from qsched_core.search import CalibrationSettings
from qsched_core.search.ranking import (
    Rules,
    first_round,
    next_round,
    parse_ranking,
    ranked,
    ranking_of,
    replayed,
    weights,
)
from qsched_core.search.space import RampSpace
from qsched_core.study import CalibrationError
from qsched_core.study.rankings import RankingStudy
from qsched_core.trajectory import Candidate, Trajectory

TRAJECTORY = Trajectory.of((1.0, 0.9, 0.75, 0.5, 0.0))
SPACE = RampSpace(TRAJECTORY, 0.6, 1.6)
TARGET = {"c_x start": 1.07, "c_eps start": 1.31}


def value(point, target=TARGET):
    return -sum((point[name] - target[name]) ** 2 for name in point)


# What a person writes


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("3 1 5", ((2,), (0,), (4,))),
        ("3, 1,5", ((2,), (0,), (4,))),
        ("3=1 5", ((2, 0), (4,))),
        (" 3 = 1  5 ", ((2, 0), (4,))),
        ("6", ((5,),)),
        ("0", ()),
        ("", ()),
    ],
)
def test_a_ranking_is_read_best_first(text, groups):
    assert parse_ranking(text, 6) == groups


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("7", "'7' is no number from 1 to 6"),
        ("3 0", "'0' is no number"),
        ("3 1 3", "names 3 twice"),
        ("3=3", "names 3 twice"),
        ("best", "'best' is no number"),
        ("-1", "'-1' is no number"),
        ("1 \u0663", "is no number"),
        ("3==1", "'' is no number"),
    ],
)
def test_what_can_not_be_read_is_named(text, says):
    with pytest.raises(CalibrationError, match=says):
        parse_ranking(text, 6)


# The estimator


@given(st.integers(2, 12), st.data())
def test_the_weights_are_the_papers(count, data):
    """m - 1 - 2r for rank r, -k for the rest, over k(k - 1) / 2 + k(m - k)."""
    k = data.draw(st.integers(1, count))
    order = data.draw(st.permutations(range(count)))
    found = weights(tuple((member,) for member in order[:k]), count)
    edges = k * (k - 1) / 2 + k * (count - k)
    for r, member in enumerate(order):
        wanted = count - 1 - 2 * r if r < k else -k
        assert found[member] == pytest.approx(wanted / edges if edges else 0)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_equals_and_the_unranked_have_no_edge_between_them(levels):
    ranking = tuple(
        tuple(i for i, level in enumerate(levels) if level == wanted)
        for wanted in sorted(set(levels) - {3})
    )
    found, count = weights(ranking, len(levels)), len(levels)
    pairs = [(i, j) for i, j in combinations(range(count), 2) if levels[i] != levels[j]]
    for i in range(count):
        wins = sum(1 for pair in pairs if i in pair and levels[i] == min(levels[k] for k in pair))
        losses = sum(1 for pair in pairs if i in pair) - wins
        assert found[i] == pytest.approx((wins - losses) / len(pairs) if pairs else 0)
    assert sum(found) == pytest.approx(0)


def test_equal_values_are_equals():
    assert ranking_of([1.0, 3.0, 1.0, 2.0]) == ((1,), (3,), (0, 2))


def test_the_estimate_points_up_on_the_mean():
    """On a slope in two coordinates: the mean of many estimates has the slope's direction."""
    slope = (3.0, -1.0)
    draw, total = random.Random(0), [0.0, 0.0]
    for _ in range(2000):
        directions = [[draw.gauss(0, 1), draw.gauss(0, 1)] for _ in range(6)]
        values = [sum(s * x for s, x in zip(slope, xi, strict=True)) for xi in directions]
        best = ranking_of(values)[:3]
        for w, xi in zip(weights(best, 6), directions, strict=True):
            total = [t + w * x for t, x in zip(total, xi, strict=True)]
    assert total[1] / total[0] == pytest.approx(slope[1] / slope[0], abs=0.05) and total[0] > 0


# Rounds


def ranked_rounds(count, rank, seed=0, **rules):
    rules = Rules(seed=seed, **rules)
    this = first_round(SPACE, rules)
    for _ in range(count):
        this = next_round(SPACE, rules, this, rank([value(point) for point in this.points]))
    return this


def gain(this):
    return 1 - value(this.best) / value(SPACE.start)


def test_rankings_alone_find_the_best_of_a_quadratic():
    shares = [gain(ranked_rounds(15, ranking_of, seed)) for seed in range(20)]
    assert statistics.median(shares) > 0.95 and min(shares) > 0.8


def test_partial_and_careless_rankings_still_find_it():
    draw = random.Random(1)

    def careless(values):
        """The best three, each value misjudged by a tenth of the gain that there is."""
        noise = 0.1 * -value(SPACE.start)
        return ranking_of([v + draw.gauss(0, noise) for v in values])[:3]

    shares = [gain(ranked_rounds(20, careless, seed)) for seed in range(20)]
    assert statistics.median(shares) > 0.6


def test_a_line_round_shows_halved_steps_beside_the_best_and_the_one_before():
    rules = Rules()
    this = first_round(SPACE, rules)
    assert this.kind == "gradient" and len(this.points) == 6 and not any(this.labels)
    this = next_round(SPACE, rules, this, ((0,), (1,)))
    assert (this.kind, this.labels[:3]) == ("line", ("now", "step", "step / 2"))
    assert this.points[0] == this.best == SPACE.start
    first, second = ([this.points[k][name] - this.best[name] for name in this.best] for k in (2, 3))
    assert [2 * b for b in second] == pytest.approx(first)
    chosen = this.points[2]
    this = next_round(SPACE, rules, this, ((2,), (0,)))
    assert (this.kind, this.best, this.before, this.averaged) == (
        "gradient",
        chosen,
        SPACE.start,
        0,
    )
    this = next_round(SPACE, rules, this, ((0,),))
    assert this.labels[:3] == ("now", "before", "step")
    assert this.points[1] == SPACE.start and len(this.points) == 6


@pytest.mark.parametrize("ranking", [(), ((0,), (2,)), ((2, 0),)])
def test_while_the_best_stays_the_estimates_are_averaged(ranking):
    rules = Rules()
    line = next_round(SPACE, rules, first_round(SPACE, rules), ((0,), (1,)))
    again = next_round(SPACE, rules, line, ranking)
    assert again.best == line.best and again.averaged == 1
    assert again.points != first_round(SPACE, rules).points
    second = next_round(SPACE, rules, again, ((3,), (1,)))
    alone = replayed(SPACE, rules, [(), (), ((3,), (1,))])
    assert second.averaged == 2 and alone.averaged == 1
    assert second.gradient == pytest.approx(
        [(a + b) / 2 for a, b in zip(line.gradient, alone.gradient, strict=True)]
    )


def test_no_ranking_at_all_shows_other_directions():
    rules = Rules()
    first = first_round(SPACE, rules)
    again = next_round(SPACE, rules, first, ())
    assert again.kind == "gradient" and again.points != first.points and not again.averaged


@given(st.integers(0, 10), st.integers(3, 8), st.integers(0, 12))
def test_points_stay_in_the_box_and_a_replay_is_the_same(seed, candidates, rounds):
    rules, draw = Rules(candidates, 0.5, 1.0, seed), random.Random(seed)
    this, rankings = first_round(SPACE, rules), []
    for _ in range(rounds):
        order = draw.sample(range(candidates), draw.randint(0, candidates))
        rankings.append(tuple((place,) for place in order if place < len(this.points)))
        this = next_round(SPACE, rules, this, rankings[-1])
        for point in this.points:
            assert all(low <= point[n] <= high for n, (low, high) in SPACE.bounds.items())
    assert replayed(SPACE, rules, rankings) == this


@pytest.mark.parametrize(
    ("change", "says"),
    [({"candidates": 2}, "from 3 to 16"), ({"spread": 0.0}, "spread=0"), ({"reach": 2}, "reach=2")],
)
def test_rules_that_can_not_be_are_refused(change, says):
    with pytest.raises(CalibrationError, match=says):
        Rules(**change)


# With a scorer as the ranker


def test_the_automatic_search_makes_rounds_and_helps(tmp_path):
    result = run(World(), tmp_path, CalibrationSettings("ranking", 36))
    stages = list(dict.fromkeys(trial.stage for trial in result.trials))
    assert stages == ["start", *(f"round {n}" for n in range(1, 7))]
    assert result.verdict.kind == "helps"


def test_candidates_of_a_round_are_never_given_up_early():
    with pytest.raises(CalibrationError, match="fidelity='hyperband' has no meaning"):
        CalibrationSettings("ranking", pruner="hyperband")


# The study


ABOUT = {"study": "by eye", "model": "made up"}


def say(folder, text, about=ABOUT):
    with RankingStudy(folder, about) as study:
        return ranked(study, SPACE, Rules(), text)


def test_a_study_goes_on_where_it_was(tmp_path):
    first = say(tmp_path, "")
    assert first.round.number == 1 and first.rankings == 0 and '"1: 3 1 5"' in first.note
    second = say(tmp_path, "1: 3 1 5")
    assert second.round == replayed(SPACE, Rules(), [((2,), (0,), (4,))])
    assert say(tmp_path, "").round == second.round
    assert say(tmp_path, "1: 3 1 5").round == second.round  # the same graph runs again
    third = say(tmp_path, "2: 2 1")
    assert third.round.number == 3 and third.rankings == 2
    (path,) = tmp_path.glob("ranking-*.json")
    kept = json.loads(path.read_text())
    assert [entry["ranking"] for entry in kept["rounds"]] == ["3 1 5", "2 1"]
    assert kept["rounds"][0]["told"]["gradient"] == list(second.round.gradient)


def test_a_text_without_a_round_ranks_what_was_shown_and_is_taken_once(tmp_path):
    second = say(tmp_path, "3 1 5")
    assert second.round.number == 2
    again = say(tmp_path, "3 1 5")
    assert again.round == second.round and 'write "2: 3 1 5"' in again.note
    assert say(tmp_path, "2: 3 1 5").round.number == 3
    assert say(tmp_path, "2 1").round.number == 4


def test_another_study_or_model_begins_anew(tmp_path):
    say(tmp_path, "3 1 5")
    for change in ({"study": "other"}, {"model": "other"}):
        assert say(tmp_path, "", ABOUT | change).round.number == 1


@pytest.mark.parametrize("text", ["3: 1", "1: 2 1", "x: 1", ": 1", "-1: 2"])
def test_a_ranking_of_another_round_is_refused_and_nothing_is_kept(text, tmp_path):
    say(tmp_path, "1: 3 1 5")
    with pytest.raises(CalibrationError, match="this is round 2"):
        say(tmp_path, text)
    with pytest.raises(CalibrationError, match="is no number"):
        say(tmp_path, "2: 9")
    assert say(tmp_path, "").rankings == 1


def test_a_killed_process_leaves_the_rankings_before_it(tmp_path, repo_root):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system has no SIGKILL")
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(repo_root)!r}, {os.path.dirname(__file__)!r}]
import test_ranking as t
with t.RankingStudy(sys.argv[1], t.ABOUT) as study:
    t.ranked(study, t.SPACE, t.Rules(), "1: 3 1 5")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert say(tmp_path, "").round == replayed(SPACE, Rules(), [((2,), (0,), (4,))])


def test_a_damaged_study_and_one_in_use_are_named(tmp_path):
    say(tmp_path, "1: 3 1 5")
    (path,) = tmp_path.glob("ranking-*.json")
    with (
        RankingStudy(tmp_path, ABOUT),
        pytest.raises(CalibrationError, match=f"{path.name} is in use"),
    ):
        say(tmp_path, "")
    for damage in (b"{", b"[]", b'{"format": "qsched ranking", "version": 2}'):
        path.write_bytes(damage)
        with pytest.raises(CalibrationError, match=f"{path.name} is damaged"):
            say(tmp_path, "")


class Fixed:
    """Scores pictures by nothing but their mean, and counts them."""

    def __init__(self, sign=1.0):
        self.sign, self.count = sign, 0

    def describe(self):
        return {"sign": self.sign}

    def score(self, images, prompts):
        self.count += len(images)
        values = tuple((self.sign * images.flatten(1).mean(1)).tolist())
        return Scores(values, (0.0,) * len(values), values)


class Brighter:
    """Pictures [8, 8, 1] that are brighter the higher c_x is at the first step."""

    trajectory, width, height, max_batch = TRAJECTORY, 8, 8, 64

    def images(self, members, candidates, on_step=None):
        light = [candidate.correction.c_x[0] for candidate in candidates]
        own = 1 + torch.linspace(0, 0.1, len(members))
        return (torch.tensor(light).unsqueeze(1) * own)[..., None, None, None].expand(
            -1, -1, 8, 8, 1
        )


@pytest.mark.parametrize(
    ("c_x", "sign", "says"),
    [(1.1, 1.0, "agrees with you"), (1.1, -1.0, "prefers c = 1"), (0.9, 1.0, "prefers c = 1")],
)
def test_a_scorer_speaks_beside_the_rankings_and_nothing_is_scored_twice(c_x, sign, says, tmp_path):
    members = PromptSet(tuple("abcdefgh"), tuple(range(8)))
    best = Candidate(TRAJECTORY, ScalarCorrection.ramp({"c_x": (c_x, 1.0)}, TRAJECTORY.steps))
    measure = Fixed(sign)
    for _ in range(2):
        with RankingStudy(tmp_path, ABOUT) as study:
            told = beside(study, Brighter(), measure, best, members)
    assert says in told.text and "on 8 prompts" in told.text
    assert measure.count == 16
    assert told.to_dict()["jaq_gain"]["n"] == 8
    assert say(tmp_path, "1: 3 1 5").rankings == 1  # the notes take no ranking's place
    with RankingStudy(tmp_path, ABOUT) as study:
        assert len(study.notes) == 2 and len(study.entries) == 1
        assert beside(study, Brighter(), measure, Candidate.identity(TRAJECTORY), members) is None
        with pytest.raises(CalibrationError, match="at least 2"):
            beside(study, Brighter(), measure, best, members.part(0, 1))
    assert measure.count == 16


def test_a_schedule_says_how_many_rankings_made_it():
    rankings = {"by": "a person", "count": 7, "study": "by eye"}
    schedule = QSchedule.identity(TRAJECTORY, source="ranking", rankings=rankings)
    assert ("origin", "learned by 7 rankings of a person") in provenance_rows(schedule)
