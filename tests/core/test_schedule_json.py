"""A schedule's JSON, fuzzed: nothing but a valid one is accepted, and nothing crashes."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schedule_cases import RAMPED, plain, scalar_schedule, schedules

from qsched_core.schedule import QSchedule, ScheduleError

CONTENT = json.loads(RAMPED.to_json())


def refused(text) -> str:
    """The message with which ``text`` is refused; short, and encodable for a log or an answer."""
    with pytest.raises(ScheduleError) as error:
        QSchedule.from_json(text)
    message = str(error.value)
    assert message.encode()
    assert len(message) < 600
    return message


def accepted_or_refused(text: str) -> None:
    try:
        schedule = QSchedule.from_json(text)
    except ScheduleError as error:
        assert str(error).encode()
        return
    assert QSchedule.from_json(schedule.to_json()) == schedule


@given(schedules())
def test_round_trip_is_exact(schedule):
    again = QSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.to_json() == schedule.to_json()


json_values = plain | st.recursive(
    st.integers() | st.floats() | st.text(max_size=5),  # NaN, Infinity and lone surrogates too
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.text() | json_values.map(json.dumps) | st.binary())
@example("")
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example("9" * 100_000)
@example("NaN")
@example('"\\ud800"')
def test_arbitrary_input_is_refused(text):
    refused(text)


def _places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        yield from _places(part, (*path, key))


def _replaced(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return content


odd_numbers = st.sampled_from(
    [0, -1, 1e999, -1e999, float("nan"), 1e308, 5e-324, 10**400, 2**64, True, False, "1", None]
)


@given(st.sampled_from(list(_places(CONTENT))), json_values | odd_numbers)
@settings(max_examples=400)
def test_a_valid_schedule_with_one_value_replaced_never_crashes(path, value):
    accepted_or_refused(json.dumps(_replaced(CONTENT, path, value)))


@given(st.data())
@settings(max_examples=300)
def test_a_valid_schedule_with_its_text_damaged_never_crashes(data):
    text = RAMPED.to_json()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    accepted_or_refused(text[:start] + data.draw(st.text(max_size=6)) + text[end:])


@given(schedules(), st.integers(1, 3), st.integers(0, 2**16))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_truncated_text_is_refused(schedule, parts, cut):
    text = schedule.to_json()
    refused(text[: cut % (len(text) - 1)])
    refused(text * (parts + 1))


@pytest.mark.parametrize("path", [p for p in _places(CONTENT) if p and isinstance(p[-1], str)])
def test_every_field_but_the_provenance_is_needed(path):
    content = copy.deepcopy(CONTENT)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    if path == ("provenance",):
        assert QSchedule.from_json(json.dumps(content)) == RAMPED
    else:
        assert path[-1] in refused(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format",), "qsched2", "format"),
        (("version",), 3, "version=3"),
        (("version",), 2, "trajectory is missing"),
        (("version",), True, "version=True"),
        (("version",), 1.0, "version=1.0"),
        (("solver",), None, "solver=None"),
        (("solver",), "x" * 10**5, "solver="),
        (("flow",), 0, "flow=0"),
        (("flow",), "true", "flow='true'"),
        (("sigmas", 0), True, "sigmas[0]=True"),
        (("sigmas", 0), "1.0", "sigmas[0]='1.0'"),
        (("sigmas", 1), 10**400, "sigmas[1]="),
        (("sigmas",), [1] * 10**4, "sigmas has 10000 values"),
        (("sigmas",), {}, "sigmas={}"),
        (("correction", "c_x", 2), 4.2, "c_x[2]=4.2 is outside [0.25, 4.0]"),
        (("correction", "c_eps", 0), -1, "c_eps[0]=-1 is outside"),
        (("correction", "kind"), "per_channel", "kind='per_channel'"),
        (("correction", "kind"), ["scalar"], "kind=['scalar']"),
        (("correction",), [1.0], "kind=None"),
        (("correction", "c_y"), [1.0], "'c_y' is no field of the correction"),
        (("comment",), "mine", "'comment' is no field of the schedule"),
        (("provenance",), None, "provenance=None"),
        (("provenance", "a"), "\ud800", "surrogate"),
        (("provenance", "a"), 2**64, "provenance.a"),
        (("provenance", "a"), "b" * (2**18 + 1), "262144 are kept"),
    ],
)
def test_an_invalid_value_is_named(path, value, named):
    assert named in refused(json.dumps(_replaced(CONTENT, path, value)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("place", ["1.0,", '"provenance": {"a": ['])
def test_numbers_that_are_none_are_refused(number, place):
    text = RAMPED.to_json().replace('"provenance": {}', '"provenance": {"a": [1.0, 2]}')
    before = f"{number}," if place == "1.0," else f"{place}{number}, "
    refused(text.replace(place, before, 1))


def test_a_key_that_is_given_twice_is_refused():
    text = RAMPED.to_json()
    assert "'flow' is given twice" in refused(text.replace("{", '{"flow": false,', 1))
    assert "twice" in refused(text.replace('"provenance": {', '"provenance": {"a": 1, "a": 1'))


def test_deep_provenance_is_refused_and_shallow_kept():
    def nested(depth: int) -> str:
        return json.dumps(_replaced(CONTENT, ("provenance", "a"), 1)).replace(
            '"a": 1', '"a": ' + "[" * depth + "]" * depth
        )

    schedule = QSchedule.from_json(nested(50))
    assert QSchedule.from_json(schedule.to_json()) == schedule
    for depth in (70, 900, 5000, 200_000):
        refused(nested(depth))


def test_a_byte_order_mark_is_skipped():
    assert QSchedule.from_json("\ufeff" + RAMPED.to_json()) == RAMPED
    refused("\ufeff\ufeff" + RAMPED.to_json())


def test_text_is_text():
    assert "not text" in refused(RAMPED.to_json().encode())
    assert "not text" in refused(None)
    assert "characters" in refused(" " * 2**23 + RAMPED.to_json())


def test_lists_of_numbers_stay_on_one_line():
    lines = RAMPED.to_json().splitlines()
    assert '  "sigmas": [1.0, 0.9, 0.75, 0.5, 0.0],' in lines
    assert len(lines) == 13


@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), plain))
def test_provenance_comes_back_as_it_was(provenance):
    schedule = scalar_schedule((1.0, 0.0), (1.1,), (1.0,), provenance=provenance)
    assert QSchedule.from_json(schedule.to_json()).provenance == provenance
