"""What is damaged on disk in a study is named, and evaluated again or refused: never taken."""

from __future__ import annotations

import json
import os
import random
import sqlite3

import pytest
import torch
from planted import TRAJECTORY
from search_cases import World, outcome, run

from qsched_core.evaluation.study import ArmStudy, Part, keep_features, kept_features
from qsched_core.objective import Scores
from qsched_core.search import CalibrationSettings
from qsched_core.search.space import NOTHING, RampSpace
from qsched_core.study import COMMAND_LINE, CalibrationError, Journal, seal
from qsched_core.study import shared as shared_module
from qsched_core.study.journal import journal_path
from qsched_core.study.shared import SharedStore
from qsched_core.study.store import Record

NAME = "0e74d89ace355b0ccb8ccf394056e3b0ed591436edefdf945fc9b3e0a43027bc"
CONTENT = {"solver": "euler", "budget": 8}
NOTES = {"precheck": {"steps": [0.0672, 0.1118], "nfe": 24}}
STAGES = ("ramp", "heldout 03aee5071e4f99e9")


def record(slot: int, point: dict, pruned: bool = False) -> Record:
    jaq = (1.25 + slot, 2.5)
    return Record(slot, point, Scores(jaq, (0.5, 0.25), jaq, {"a": jaq}), 0.125, 16, pruned)


TRIALS = {
    "ramp": {
        slot: record(slot, {"c_x start": 0.9 + slot / 16, "c_eps start": 1.1}, pruned=slot == 2)
        for slot in range(3)
    },
    STAGES[1]: {slot: record(slot, {}) for slot in range(2)},
}


def fill(store) -> None:
    for stage, records in TRIALS.items():
        space = NOTHING if stage != "ramp" else RampSpace(TRAJECTORY)
        with store.claim(stage, space, {slot: r.point for slot, r in records.items()}) as claim:
            for each in records.values():
                claim.finish(each)
    for key, value in NOTES.items():
        store.put(key, value)


def read(store) -> dict:
    found = {stage: store.records(stage) for stage in STAGES}
    return found | {"notes": {key: store.get(key) for key in NOTES}}


def check(found: dict) -> int:
    """How much is missing; all else is what was kept."""
    missing = 0
    for stage in STAGES:
        assert found[stage].items() <= TRIALS[stage].items()
        missing += len(TRIALS[stage]) - len(found[stage])
    for key, value in found["notes"].items():
        assert value in (None, NOTES[key])
        missing += value is None
    return missing


def mutant(data: bytes, chance: random.Random) -> bytes:
    """``data`` with one byte other than it was: digits for digits, else anything."""
    at = chance.randrange(len(data))
    kind = b"0123456789" if data[at : at + 1].isdigit() else bytes(range(1, 256))
    byte = chance.choice([b for b in kind if b != data[at]])
    return data[:at] + bytes([byte]) + data[at + 1 :]


@pytest.fixture
def quick(monkeypatch):
    """Nothing here is to outlive a power cut."""
    monkeypatch.setattr(Journal, "_check_folder", lambda self: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_no_damaged_byte_of_a_journal_is_taken(tmp_path, quick):
    with Journal(tmp_path, NAME) as journal:
        fill(journal)
        assert check(read(journal)) == 0
    file = journal_path(tmp_path, NAME)
    data, chance = file.read_bytes(), random.Random(0)
    refused = again = 0
    for _ in range(2000):
        with file.open("r+b") as opened:  # to make the file anew takes ten times as long
            opened.write(mutant(data, chance))
            opened.truncate()
        try:
            with Journal(tmp_path, NAME) as journal:
                again += bool(check(read(journal)))
        except CalibrationError as error:
            refused += 1
            assert str(file) in str(error) and "damaged" in str(error)
    assert refused and again


@pytest.fixture
def shared(tmp_path, quick):
    pytest.importorskip("sqlalchemy", reason="shared studies need sqlalchemy")
    database = COMMAND_LINE.database(f"sqlite:///{tmp_path}/study.db")
    with SharedStore(database, "x", CONTENT) as store:
        fill(store)
        assert check(read(store)) == 0
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as connection:
        connection.execute("pragma synchronous = off")
        yield database, connection
    connection.close()


TEXTS = {
    "trial_user_attributes": ("trial_user_attribute_id", "value_json"),
    "study_user_attributes": ("study_user_attribute_id", "value_json"),
    "trial_params": ("param_id", "distribution_json"),
}


def test_no_damaged_byte_of_a_shared_study_is_taken(shared):
    database, connection = shared
    chance = random.Random(0)
    rows = [
        (table, key, column, *row)
        for table, (key, column) in TEXTS.items()
        for row in connection.execute(f"select {key}, {column} from {table}")
    ]
    weights = [len(row[-1]) for row in rows]
    refused = again = 0
    with SharedStore(database, "x", CONTENT) as store:
        for table, key, column, row, text in chance.choices(rows, weights, k=400):
            change = f"update {table} set {column} = ? where {key} = ?"
            connection.execute(change, (mutant(text.encode(), chance).decode("latin-1"), row))
            try:
                again += bool(check(read(store)))
            except CalibrationError as error:
                refused += 1
                assert store.where in str(error) and "damaged" in str(error)
            connection.execute(change, (text, row))
        assert refused and again and check(read(store)) == 0


def edit(file, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


def test_a_damaged_trial_is_named_and_no_other_lost(tmp_path, caplog):
    with Journal(tmp_path, NAME) as journal:
        fill(journal)
    file = journal_path(tmp_path, NAME)
    edit(file, '"point":{"c_x start":0.9625', '"point":{"c_x start":0.9125')
    edit(file, '"value":{"steps":[0.0672', '"value":{"steps":[0.0673')
    with Journal(tmp_path, NAME) as journal:
        assert journal.records("ramp") == {slot: TRIALS["ramp"][slot] for slot in (0, 2)}
        assert journal.records("ramp") and journal.get("precheck") is None
        again = TRIALS["ramp"][1]
        with journal.claim("ramp", RampSpace(TRAJECTORY), {1: again.point}) as claim:
            claim.finish(again)
        assert journal.records("ramp") == TRIALS["ramp"]
    told = [line for line in caplog.messages if "damaged" in line]
    assert len(told) == 2 and all(str(file) in line for line in told)
    assert "trial 1 of 'ramp'" in told[0] and "the note 'precheck'" in told[1]


def test_a_line_that_can_be_given_up_is_named_and_the_rest_goes_on(tmp_path):
    with Journal(tmp_path, NAME) as journal:
        fill(journal)
    file = journal_path(tmp_path, NAME)
    lines = file.read_bytes().splitlines(keepends=True)
    for number, mend in ((1, "delete it"), (3, "delete that line")):
        file.write_bytes(
            b"".join([*lines[: number - 1], lines[number - 1][:-3], b"\n", *lines[number:]])
        )
        with (
            pytest.raises(CalibrationError, match=f"damaged in line {number} .*{mend}"),
            Journal(tmp_path, NAME),
        ):
            pass
    file.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with Journal(tmp_path, NAME) as journal:
        assert check(read(journal)) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_without_its_checksum_nothing_new_is_taken(tmp_path, stage):
    with Journal(tmp_path, NAME) as journal:
        fill(journal)
    file = journal_path(tmp_path, NAME)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for attributes in (line.get("user_attrs"), line.get("user_attr", {}).get("precheck")):
            if attributes:
                del attributes["sum"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with Journal(tmp_path, NAME) as journal:
        assert journal.records(stage) == {} and journal.get("precheck") is None


def test_a_search_with_a_damaged_trial_comes_to_the_same_result(tmp_path):
    settings = CalibrationSettings("gp", 9)
    whole = run(World(), tmp_path, settings)
    lines = whole.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if '"scores"' not in line:
            continue
        head, _, tail = line.partition('"jaq":[')
        mutated = head + '"jaq":[9' + tail
        whole.journal.write_text(
            "".join([*lines[:number], mutated, *lines[number + 1 :]]), newline="\n"
        )
        world = World()
        assert outcome(run(world, tmp_path, settings)) == outcome(whole) and len(world.calls) == 1


def test_a_damaged_trial_of_a_shared_study_is_free_again(shared, caplog):
    database, connection = shared
    for before, after in (('"slot": 1', '"slot": 2'), ('"seconds": 0.125', '"seconds": 1e-9')):
        connection.execute(
            "update trial_user_attributes set value_json = replace(value_json, ?, ?) where key = "
            "'record' and value_json like '%\"slot\": 1,%' and value_json like '%c_x start%'",
            (before, after),
        )  # fmt: skip
    with SharedStore(database, "x", CONTENT) as store:
        assert set(store.records("ramp")) == {0, 2}
        again = TRIALS["ramp"][1]
        with store.claim("ramp", RampSpace(TRAJECTORY), {1: again.point, 0: again.point}) as claim:
            assert set(claim.points) == {1}
            claim.finish(again)
        assert store.records("ramp") == TRIALS["ramp"]
    told = [line for line in caplog.messages if "damaged" in line]
    assert len(told) == 1 and store.where in told[0] and "trial 1 of 'ramp'" in told[0]


@pytest.mark.parametrize(
    "change", ["value_json = replace(value_json, 'euler', 'eular')", "value_json = '{}'"]
)
def test_a_shared_study_whose_content_is_damaged_is_refused(shared, monkeypatch, change):
    database, connection = shared
    monkeypatch.setattr(shared_module, "PATIENCE", (0.01,))
    connection.execute(f"update study_user_attributes set {change} where key = 'content'")
    with (
        pytest.raises(CalibrationError, match="or that is damaged"),
        SharedStore(database, "x", CONTENT),
    ):
        pass


def test_a_damaged_piece_of_a_long_record_is_named(tmp_path, caplog):
    pytest.importorskip("sqlalchemy", reason="shared studies need sqlalchemy")
    values = tuple(i / 7 for i in range(900))
    long = Record(0, {}, Scores(values, values, values), 0.1, 1)
    database = COMMAND_LINE.database(f"sqlite:///{tmp_path}/study.db")
    with SharedStore(database, "x", CONTENT) as store:
        with store.claim("ramp", NOTHING, {0: {}}) as claim:
            claim.finish(long)
        assert store.records("ramp") == {0: long}
        for change in ("value_json = replace(value_json, '1.1', '1.2')", "key = 'lost'"):
            with sqlite3.connect(tmp_path / "study.db") as connection:
                connection.execute(
                    f"update trial_user_attributes set {change} where key like 'record % 1'"
                )
            connection.close()
            assert store.records("ramp") == {}
    assert "trial 0 of 'ramp' is damaged" in caplog.text


def test_no_damaged_byte_of_an_evaluations_part_is_taken(tmp_path, quick):
    scores = TRIALS["ramp"][0].scores
    study, part = ArmStudy(tmp_path), Part(0, scores, 0.125, 16)
    features = {"tower": torch.arange(6.0).reshape(2, 3)}
    study.keep(part, features, torch.rand(2, 4, 4, 3, generator=torch.manual_seed(0)))
    pictures = study.pictures(part, range(2))
    (file,) = tmp_path.glob("part-*")
    data, chance, taken = file.read_bytes(), random.Random(0), 0
    for _ in range(1500):
        file.write_bytes(mutant(data, chance))
        found = study.load(0, 2, ["tower"])
        if found is not None:
            taken += 1
            assert found == part and torch.equal(study.features(part, "tower"), features["tower"])
            assert torch.equal(study.pictures(part, range(2)), pictures)
    assert taken < 5  # spaces of the header, at most


def test_no_damaged_byte_of_kept_features_is_taken(tmp_path, quick):
    features, file = torch.arange(6.0).reshape(2, 3), tmp_path / "references.safetensors"
    keep_features(file, features)
    data, chance = file.read_bytes(), random.Random(0)
    for _ in range(300):
        file.write_bytes(mutant(data, chance))
        found = kept_features(file)
        assert found is None or torch.equal(found, features)
    file.write_bytes(data)
    assert torch.equal(kept_features(file), features)


def test_a_trial_that_did_not_change_is_checked_once_however_often_the_study_is_read(
    tmp_path, monkeypatch
):
    """Every proposal reads the study: checks of all trials each time are quadratic."""
    checked, digest = [], seal.digest
    monkeypatch.setattr(seal, "digest", lambda content: checked.append(1) or digest(content))
    settings = CalibrationSettings("grid", 64, together=1)
    run(World(), tmp_path, settings)
    made = len(checked)
    assert run(World(), tmp_path, settings).new_trials == 0
    assert made < 5 * 64 and len(checked) - made < 3 * 64
