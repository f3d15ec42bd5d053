"""Translations of the nodes: complete, made from the schemas, and served."""

from __future__ import annotations

import json

import pytest

from devtools.locales import FOLDER, OF_THE_MACHINE, english, languages, make, terms, words

ALL = ("en", *languages())


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


@pytest.fixture(scope="module")
def made(info, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locales")
    make(info, folder)
    return folder


@pytest.mark.parametrize("language", ALL)
def test_the_file_is_what_the_schemas_and_the_words_give(made, language):
    """Else: python -m devtools.locales."""
    wanted, found = (
        json.loads((folder / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for folder in (made, FOLDER)
    )
    assert found == wanted


def test_english_has_every_tooltip_but_those_of_the_machine(info):
    defs = english(info)
    for name, node in defs.items():
        for key, entry in node["inputs"].items():
            assert ("tooltip" in entry) == (key not in OF_THE_MACHINE), f"{name}.{key}"
        assert all(entry["tooltip"] for entry in node["outputs"].values()), name


def test_every_name_is_translated_and_none_is_left_over(info):
    known, wanted = words(), set(terms(english(info)))
    assert wanted == set(known)
    for term, found in known.items():
        assert set(found) == set(languages()), term
        assert all(text.strip() == text and text for text in found.values()), term


def test_a_language_calls_no_two_inputs_of_a_node_the_same():
    for language in ALL:
        text = (FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")
        for name, node in json.loads(text).items():
            names = [entry["name"] for entry in node["inputs"].values()]
            assert len(set(names)) == len(names), (language, name)


def test_comfyui_serves_them(server):
    served = server.get("/i18n")
    for language in ALL:
        assert served[language]["nodeDefs"]["QSchedKSampler"]["display_name"]
    assert served["de"]["nodeDefs"]["QSchedQuantizeModel"]["display_name"] == "Modell quantisieren"
