"""Translations of the nodes: complete, true to every number and name, and served."""

from __future__ import annotations

import json
import re

import pytest

from devtools.locales import FOLDER, LANGUAGES, OF_THE_MACHINE, english, make, texts, words

NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What no language has its own word for: "4: 0", {model}, [heldout], pyiqa:METRIC, models/qsched, NAME-summary.csv,
# quality_weight, aq+hps, ViT-B-32, 2*clip_iqa.
LITERAL = re.compile(
    r'"[^"]+"|\{\w+\}|\[\w+\]|\b\w+:[A-Z]\w+|\bmodels/\w+|\bNAME[\w.-]*|\b[a-z]+(?:_\w+)+\b'
    r"|\b\w+(?:[+*|]\w+)+|\bViT-[\w-]+|\bc_\w+"
)


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


@pytest.fixture(scope="module")
def made(info, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locales")
    make(info, folder)
    return folder


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
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


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_and_none_is_left_over(info, language):
    """An English text that changed needs a new translation: python -m devtools.locales --check."""
    known, wanted = words(language), texts(english(info))
    assert [text for text in wanted if text not in known] == []
    assert [text for text in known if text not in wanted] == []
    assert all(text.strip() == text and text for text in known.values())
    assert {"zh", "ja", "de", "fr", "es"} == set(LANGUAGES)


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_names_and_descriptions_have_no_sign_of_the_pages_message_format(language):
    """vue-i18n would fill in {name}, cut at | and follow @; tooltips are shown as they are."""
    text = (FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")
    for node in json.loads(text).values():
        entries = [*node["inputs"].values(), *node["outputs"].values()]
        shown = [node["display_name"], node["description"], *(entry["name"] for entry in entries)]
        assert [line for line in shown if set(line) & set("{}|@")] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_is_not_left_in_english(language):
    same = [text for text, own in words(language).items() if own == text and " " in text]
    assert [text for text in same if text.endswith(".")] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_numbers_and_the_names_of_the_text(language):
    for text, own in words(language).items():
        assert sorted(NUMBER.findall(own)) == sorted(NUMBER.findall(text)), (text, own)
        if text.endswith("."):  # a sentence; a name is translated whole
            missing = [name for name in LITERAL.findall(text) if name not in own]
            assert missing == [], (text, own)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_node_is_called_as_the_page_calls_it(info, language):
    known = words(language)
    names = [node["display_name"] for name, node in info.items() if name.startswith("QSched")]
    for text in (text for text in known if text.endswith(".")):
        rest = text
        for name in sorted(names, key=len, reverse=True):
            if name in rest:
                rest = rest.replace(name, "")
                assert known[name] in known[text], (text, name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_choices_that_a_tooltip_explains_keep_their_names(info, language):
    known, explained = words(language), 0
    for name, node in info.items():
        if not name.startswith("QSched"):
            continue
        for group in ("required", "optional"):
            for key, (kind, *more) in node["input"].get(group, {}).items():
                tooltip = more[0]["tooltip"] if kind == "COMBO" else ""
                if key in OF_THE_MACHINE:
                    continue
                for option in more[0].get("options", ()) if tooltip else ():
                    if re.search(rf"(?:^|[ ;.]){re.escape(str(option))}: ", tooltip):
                        assert option in known[tooltip], (name, key, option)
                        explained += 1
    assert explained > 20


def test_a_language_calls_no_two_inputs_of_a_node_the_same():
    for language in ("en", *LANGUAGES):
        text = (FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")
        for name, node in json.loads(text).items():
            names = [entry["name"] for entry in node["inputs"].values()]
            assert len(set(names)) == len(names), (language, name)


def test_comfyui_serves_them(server):
    served = server.get("/i18n")
    for language in ("en", *LANGUAGES):
        assert served[language]["nodeDefs"]["QSchedKSampler"]["display_name"]
    quantize = served["de"]["nodeDefs"]["QSchedQuantizeModel"]
    assert quantize["display_name"] == "Modell quantisieren"
    assert (
        quantize["description"]
        == words("de")[english(server.object_info())["QSchedQuantizeModel"]["description"]]
    )
