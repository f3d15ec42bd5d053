"""QSchedule: what it accepts, what it refuses, and how it meets other sigmas."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsched_core.schedule import QSchedule, ScheduleError, linear_ramp

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)

coefficients = st.floats(0.25, 4.0)


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 16))
    flow = draw(st.booleans())
    top = 1.0 if flow else 80.0
    sigmas = draw(st.lists(st.floats(0, top), min_size=steps + 1, max_size=steps + 1, unique=True))
    column = st.lists(coefficients, min_size=steps, max_size=steps)
    return QSchedule(
        sorted(sigmas, reverse=True),
        draw(column),
        draw(column),
        draw(st.sampled_from(["euler", "euler_ancestral", "lcm"])),
        flow,
        {"note": draw(st.text(max_size=20))},
    )


@given(schedules())
def test_json_round_trip_is_exact(schedule):
    assert QSchedule.from_json(schedule.to_json()) == schedule


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.text() | json_values.map(json.dumps))
def test_arbitrary_text_is_refused_with_a_schedule_error(text):
    with pytest.raises(ScheduleError):
        QSchedule.from_json(text)


@given(
    schedules(),
    st.sampled_from(["format", "version", "solver", "flow", "sigmas", "correction", "provenance"]),
    json_values,
)
def test_a_replaced_field_never_crashes(schedule, key, value):
    content = json.loads(schedule.to_json())
    content[key] = value
    try:
        again = QSchedule.from_json(json.dumps(content))
    except ScheduleError:
        return
    assert QSchedule.from_json(again.to_json()) == again


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sigmas": (1.0, 0.9, 0.9, 0.5, 0.0)}, "decrease"),
        ({"sigmas": (1.0, 0.5, 0.0)}, "c_x has 4 values for 2 steps"),
        ({"sigmas": (14.6, 0.9, 0.75, 0.5, 0.0)}, "14.6"),
        ({"sigmas": (1.0, 0.9, 0.75, 0.5, -0.1)}, "-0.1"),
        ({"c_x": (1.0, 1.0, 1.0, 7.5)}, "c_x[3]=7.5"),
        ({"c_eps": (1.0, math.nan, 1.0, 1.0)}, "c_eps[1]=nan"),
        ({"c_eps": (1.0, 1.0, True, 1.0)}, "c_eps[2]=True"),
        ({"solver": "heun"}, "heun"),
        ({"flow": 1}, "flow=1"),
        ({"provenance": {"x": object()}}, "provenance"),
    ],
)
def test_invalid_fields_are_named(change, named):
    ones = (1.0,) * 4
    fields = {"sigmas": SIGMAS, "c_x": ones, "c_eps": ones, "flow": True} | change
    with pytest.raises(ScheduleError) as error:
        QSchedule(**fields)
    assert named in str(error.value)


@given(schedules())
def test_learned_sigmas_get_their_own_coefficients(schedule):
    match = schedule.at(schedule.sigmas, "strict")
    close = [
        math.isclose(a, b, rel_tol=2e-3)
        for a, b in zip(schedule.sigmas[:-1], schedule.sigmas[1:-1], strict=False)
    ]
    if not any(close):
        assert (match.correction.c_x, match.correction.c_eps) == (schedule.c_x, schedule.c_eps)
    assert match.note == ""


def test_a_partial_denoise_takes_the_tail_of_the_trajectory():
    schedule = QSchedule(SIGMAS, (1.0, 1.1, 1.2, 1.3), (0.9, 0.8, 0.7, 0.6))
    match = schedule.at(SIGMAS[2:], "strict")
    assert match.correction.c_x == (1.2, 1.3)
    assert match.correction.c_eps == (0.7, 0.6)


@given(st.floats(1e-4, 0.9999), schedules())
def test_interpolated_coefficients_stay_between_the_learned_ones(sigma, schedule):
    match = schedule.at((sigma, 0.0))
    for got, learned in (
        (match.correction.c_x[0], schedule.c_x),
        (match.correction.c_eps[0], schedule.c_eps),
    ):
        assert min(learned) - 1e-9 <= got <= max(learned) + 1e-9


def test_a_foreign_sigma_is_noted_and_strict_refuses_it():
    schedule = QSchedule(SIGMAS, (1.0, 1.1, 1.2, 1.3), (1.0,) * 4)
    match = schedule.at((1.0, 0.82, 0.5, 0.0))
    assert match.correction.c_x[0] == 1.0
    assert 1.1 < match.correction.c_x[1] < 1.2
    assert "1 of 3 steps" in match.note
    with pytest.raises(ScheduleError, match=r"sigma=0\.82"):
        schedule.at((1.0, 0.82, 0.5, 0.0), "strict")


def test_ramp_is_linear_and_meets_both_ends():
    assert linear_ramp(0.8, 1.1, 4) == pytest.approx((0.8, 0.9, 1.0, 1.1))
    assert linear_ramp(0.8, 1.1, 1) == (0.8,)
    assert QSchedule.ramp(SIGMAS, (1.0, 1.0), (1.0, 1.0)).is_identity


def test_saving_leaves_only_the_file(tmp_path):
    schedule = QSchedule.identity(SIGMAS)
    schedule.save(tmp_path / "deep" / "a.json")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]
    assert QSchedule.load(tmp_path / "deep" / "a.json") == schedule


def test_loading_names_the_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ScheduleError, match=r"broken\.json"):
        QSchedule.load(path)
