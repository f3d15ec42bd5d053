"""Search by rankings alone: ZO-RankSGD (arXiv 2303.03751), for a person's eye or any other judge.

A round shows points of a box and gets a ranking of them, which need not name all.  Rounds of two
kinds take turns.  A *gradient* round shows the current point moved by ``spread`` times random
directions; the ranking gives an estimate of the way up.  A *line* round shows steps that way, each
half as long as the one before, beside the current point and the one before it; the best of them is
the new current point.  While the current one stays best, the next estimates are averaged.

All of it follows from the settings and the rankings: a study that keeps those goes on after a
restart.  (The published code weighs ranks off by one; this is the paper's equation 8.)
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ..study.errors import CalibrationError
from ..study.rankings import Entry, RankingStudy
from ..study.store import Point
from ..text import shown
from .plan import Past, Plan, Stage, StageBuilder
from .space import Space

CANDIDATES, SPREAD, REACH = 6, 0.1, 0.4
LEAST, MOST = 3, 16

Ranking = tuple[tuple[int, ...], ...]  # groups of equals, the best first; who is missing is last


def parse_ranking(text: str, count: int) -> Ranking:
    """The ranking in ``text``: numbers from 1 to ``count``, the best first, "=" between equals.

    "3 1 5" puts 3 before 1 before 5 before all others; "0" or nothing ranks none.  CalibrationError
    names what can't be read.
    """
    words = re.split(r"[\s,]+", re.sub(r"\s*=\s*", "=", text.strip()))
    if words in ([""], ["0"]):
        return ()
    groups, seen = [], set()
    for word in words:
        group = []
        for part in word.split("="):
            number = int(part) if re.fullmatch(r"[0-9]{1,3}", part) else -1
            if not 1 <= number <= count:
                raise CalibrationError(
                    f"ranking={shown(text)}: {shown(part)} is no number from 1 to {count}; write the "
                    'best first, for example "3 1 5", or "0" if none is better'
                )
            if number in seen:
                raise CalibrationError(f"ranking={shown(text)} names {number} twice")
            seen.add(number)
            group.append(number - 1)
        groups.append(tuple(group))
    return tuple(groups)


def ranking_of(values: Sequence[float]) -> Ranking:
    """The ranking by values, higher is better; equal ones are equals."""
    groups: dict[float, list[int]] = {}
    for place, value in enumerate(values):
        groups.setdefault(value, []).append(place)
    return tuple(tuple(groups[value]) for value in sorted(groups, reverse=True))


def weights(ranking: Ranking, count: int) -> list[float]:
    """What each of ``count`` directions counts in the estimate (equation 8): their sum is 0.

    Over all pairs of which one is known to be better, the better one gets 1 and the other -1, divided
    by their number.  For k of m in a strict order that is m - 1 - 2r for rank r = 0, 1, ..., and -k
    for the rest, over k(k - 1) / 2 + k(m - k).
    """
    rank = [len(ranking)] * count
    for place, group in enumerate(ranking):
        for member in group:
            rank[member] = place
    found, pairs = [0.0] * count, 0
    for i, j in combinations(range(count), 2):
        if rank[i] != rank[j]:
            sign = 1.0 if rank[i] < rank[j] else -1.0
            found[i], found[j], pairs = found[i] + sign, found[j] - sign, pairs + 1
    return [value / pairs for value in found] if pairs else found


@dataclass(frozen=True)
class Rules:
    """``candidates`` in a round; ``spread`` (mu) of the directions and ``reach`` of the longest step
    are in shares of the box's sides.  CalibrationError for what can't be."""

    candidates: int = CANDIDATES
    spread: float = SPREAD
    reach: float = REACH
    seed: int = 0

    def __post_init__(self):
        if not LEAST <= self.candidates <= MOST:
            raise CalibrationError(
                f"candidates={shown(self.candidates)} must be from {LEAST} to {MOST}"
            )
        for name in ("spread", "reach"):
            if not 0 < getattr(self, name) <= 1:
                raise CalibrationError(
                    f"{name}={shown(getattr(self, name))} must be above 0 and at most 1"
                )


@dataclass(frozen=True)
class Round:
    """``points`` to be ranked; ``labels`` say what a line round shows.  ``best`` is the current point,
    ``gradient`` the estimate so far (shares of the box's sides), of ``averaged`` rounds."""

    number: int
    kind: str
    points: tuple[dict[str, float], ...]
    labels: tuple[str, ...]
    best: dict[str, float]
    before: dict[str, float]
    gradient: tuple[float, ...]
    averaged: int


def first_round(space: Space, rules: Rules) -> Round:
    start = dict(space.start)
    return _gradient_round(space, rules, 1, start, start, (), 0)


def next_round(space: Space, rules: Rules, shown_round: Round, ranking: Ranking) -> Round:
    """The round after ``shown_round``, of which ``ranking`` is known."""
    this, number = shown_round, shown_round.number + 1
    if this.kind == "gradient":
        directions = _directions(space, rules, this.number)
        weighed = weights(ranking, rules.candidates)
        new = [
            sum(w * xi[k] for w, xi in zip(weighed, directions, strict=True))
            for k in range(len(directions[0]))
        ]
        if not any(weighed):  # nothing was told: other directions
            return _gradient_round(
                space, rules, number, this.best, this.before, this.gradient, this.averaged
            )
        averaged = this.averaged + 1
        old = this.gradient or (0.0,) * len(new)
        mean = tuple(o + (n - o) / averaged for o, n in zip(old, new, strict=True))
        return _line_round(space, rules, number, this.best, this.before, mean, averaged)
    # no ranking: the current point, which stands among those shown, stays
    chosen = this.points[ranking[0][0]] if ranking else this.best
    if ranking and any(this.points[place] == this.best for place in ranking[0]):
        chosen = this.best
    if chosen == this.best:
        return _gradient_round(
            space, rules, number, this.best, this.before, this.gradient, this.averaged
        )
    return _gradient_round(space, rules, number, chosen, this.best, (), 0)


def replayed(space: Space, rules: Rules, rankings: Sequence[Ranking]) -> Round:
    """The round that follows all of ``rankings``."""
    this = first_round(space, rules)
    for ranking in rankings:
        this = next_round(space, rules, this, ranking)
    return this


def ranking_stages(plan: Plan) -> list[StageBuilder]:
    """The search with a scorer as the ranker: each round is a stage, planned from those before."""
    space, rules = plan.ramp(), Rules(seed=plan.seed)

    def base(plan: Plan, past: Sequence[Past]) -> Stage:
        return Stage("start", space, 1, fixed=(space.start,))

    def build(plan: Plan, past: Sequence[Past]) -> Stage:
        values, size = [each.value for each in past][1:], rules.candidates
        rankings = [ranking_of(values[at : at + size]) for at in range(0, len(values), size)]
        this = replayed(space, rules, rankings)
        return Stage(f"round {this.number}", space, size, fixed=this.points)

    return [base, *[build] * (plan.budget // rules.candidates)]


def _directions(space: Space, rules: Rules, number: int) -> list[list[float]]:
    """The round's directions, normal in every coordinate."""
    draw = random.Random(f"{rules.seed}/{number}")
    return [[draw.gauss(0, 1) for _ in space.bounds] for _ in range(rules.candidates)]


def _moved(space: Space, point: Point, by: Sequence[float]) -> dict[str, float]:
    """``point`` moved by shares of the box's sides, and kept inside."""
    return {
        name: min(max(point[name] + share * (high - low), low), high)
        for (name, (low, high)), share in zip(space.bounds.items(), by, strict=True)
    }


def _gradient_round(space, rules, number, best, before, gradient, averaged) -> Round:
    points = tuple(
        _moved(space, best, [rules.spread * value for value in direction])
        for direction in _directions(space, rules, number)
    )
    labels = ("",) * len(points)
    return Round(number, "gradient", points, labels, best, before, gradient, averaged)


def _line_round(space, rules, number, best, before, gradient, averaged) -> Round:
    length = math.sqrt(sum(value * value for value in gradient)) or 1.0
    points, labels = [best], ["now"]
    if before != best:
        points.append(before)
        labels.append("before")
    for halving in range(rules.candidates - len(points)):
        step = rules.reach * 2.0**-halving / length
        points.append(_moved(space, best, [step * value for value in gradient]))
        labels.append(f"step / {2**halving}" if halving else "step")
    return Round(
        number, "line", tuple(points), tuple(labels), best, before, tuple(gradient), averaged
    )


@dataclass(frozen=True)
class Ranked:
    """What a person is to rank now; ``rankings`` were given before, ``note`` is for them to read."""

    round: Round
    rankings: int
    note: str


def ranked(study: RankingStudy, space: Space, rules: Rules, text: str) -> Ranked:
    """The study's next round after ``text``, which is kept in it.

    "4: 3 1 5" ranks round 4; without a number it is the round that was shown last.  A text that was
    taken already changes nothing, so that the same graph may run again.  CalibrationError for a text
    that ranks another round, or can't be read.
    """
    this, entries = first_round(space, rules), study.entries
    for entry in entries:
        this = next_round(space, rules, this, parse_ranking(entry.text, len(this.points)))
    head, colon, rest = text.partition(":")
    named, written = bool(colon), (rest if colon else text).strip()
    again = ""
    if named:
        number = int(head) if re.fullmatch(r"\s*[0-9]{1,4}\s*", head) else 0
        done = 0 < number < this.number and entries[number - 1].text == written
        if not done and number != this.number:
            raise CalibrationError(
                f"ranking={shown(text)}: this is round {this.number}; write "
                f'"{this.number}: " and the best first'
            )
        taken = not done
    else:
        taken = bool(written)
        if taken and entries and entries[-1] == Entry(written, False, entries[-1].told):
            taken = False
            again = (
                f'; "{written}" was taken for round {this.number - 1}, to give it to this one too '
                f'write "{this.number}: {written}"'
            )
    if taken:
        ranking = parse_ranking(written, len(this.points))
        after = next_round(space, rules, this, ranking)
        told = {"round": this.number, "kind": this.kind, "points": list(this.points)}
        told |= {"best": after.best, "gradient": list(after.gradient), "averaged": after.averaged}
        study.append(Entry(written, named, told))
        this = after
    kind = (
        "random changes of the best so far"
        if this.kind == "gradient"
        else "steps the way that your rankings point, beside the best so far"
    )
    note = (
        f'round {this.number}: {kind}; write the best first, for example "{this.number}: 3 1 5", '
        f'or "{this.number}: 0" if none is better{again}'
    )
    return Ranked(this, len(study.entries), note)
