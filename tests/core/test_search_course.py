"""How far a calibration is: one measure over all its parts, and what is said of it."""

from __future__ import annotations

import itertools

import pytest
from planted import TRAJECTORY
from search_cases import PROMPTS, World, run

from qsched_core.search import CalibrationSettings
from qsched_core.search.course import CONTROL, HELDOUT, PRECHECK, SEARCH, Course, duration

SETTINGS = CalibrationSettings("grid", 16)


class SteppingWorld(World):
    """Says each of its steps, as a model does."""

    def images(self, prompts, candidates, on_step=None):
        for _ in range(self.trajectory.steps):
            on_step()
        return super().images(prompts, candidates, on_step)


def test_one_measure_rises_over_all_parts_to_its_end(tmp_path):
    said = []
    run(SteppingWorld(), tmp_path, SETTINGS, on_standing=said.append)
    done = [standing.done / standing.total for standing in said]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 1
    parts = [part for part, _ in itertools.groupby(said, key=lambda standing: standing.part)]
    assert parts == [SEARCH, HELDOUT]
    assert "loading the models" in said[0].text
    assert not any(standing.loading for standing in said[3:])
    # the parts' shares are those of their pictures
    before = max(s.done for s in said if s.part == SEARCH)
    searched, checked = 17 * len(PROMPTS.calibration), 2 * len(PROMPTS.heldout)
    assert before / said[-1].total == pytest.approx(searched / (searched + checked))


def test_the_measure_moves_inside_a_trial_not_only_after_it(tmp_path):
    said = []
    run(SteppingWorld(), tmp_path, CalibrationSettings("gp", 6), on_standing=said.append)
    first = [s.done for s in said if s.finished == 0]
    assert len(set(first)) > TRAJECTORY.steps


def test_a_resumed_run_says_from_where_it_goes_on(tmp_path):
    class StopError(Exception):
        pass

    def stop(progress):
        if progress.trial.number == 9:
            raise StopError

    settings = CalibrationSettings("gp", 16)
    with pytest.raises(StopError):
        run(SteppingWorld(), tmp_path, settings, on_trial=stop)
    said = []
    run(SteppingWorld(), tmp_path, settings, on_standing=said.append)
    texts = [standing.text for standing in said if standing.continued]
    assert "continuing from trial 10, search: trial 11 of 17" in texts[0]
    assert "continuing" not in texts[-1]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_time_left_is_that_of_all_parts():
    clock, said = Clock(), []
    course = Course(steps=4, tell=said.append, clock=clock)
    course.trials = 10
    course.expect(SEARCH, 10 * 8)
    course.expect(HELDOUT, 2 * 8)
    course.expect(CONTROL, 2 * 8)
    course.begin(PRECHECK)
    course.begin(SEARCH)
    assert said[-1].seconds_left is None  # nothing was timed
    course.measuring(8, 1)
    course.step()
    for _ in range(3):
        clock.now += 1
        course.step()
    assert said[-1].seconds_left == pytest.approx((80 + 32) * 5 / 8 - 4, rel=0.05)
    clock.now += 1
    course.scored()
    for _ in range(3):  # 5 s a trial: two more from an earlier run
        course.trial(4.0, 5.0, 8, 10, 8)
    assert said[-1].seconds_left == pytest.approx((7 + 4) * 5)
    assert "trial 4 of 10, best JAQ 4.0000, about 00:55 left" in said[-1].text
    course.begin(HELDOUT)
    assert said[-1].text == "check on held-out prompts, about 00:20 left"
    course.begin(CONTROL)
    course.measuring(16, 1)
    course.scored()
    assert said[-1].done == said[-1].total
    assert said[-1].seconds_left == 0


@pytest.mark.parametrize("seconds,text", [(-1, "00:00"), (151, "02:31"), (90061, "25:01:01")])
def test_a_duration_is_short(seconds, text):
    assert duration(seconds) == text
