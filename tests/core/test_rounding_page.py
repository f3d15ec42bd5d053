"""The HTML report of calibrated weights: its figures, layers, warnings and pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rounding_task
from rounding_cases import INT2, PROMPTS
from test_webpage import HOSTILE, Tags

from qsched_core.rounding import Proof, RoundedWeights, TaskSubject, calibrate_weights
from qsched_core.rounding.web import ARMS, report_page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    subject = TaskSubject(rounding_task.task())
    return calibrate_weights(subject, PROMPTS, INT2, folder, samples=True)


def test_the_figures_are_the_proofs(made):
    change, found = made.proof.change, Tags(report_page(made, "tiny: int2", (4_000_000, 500_000)))
    told = "\n".join(found.texts)
    assert f"{change.mean:+.5f} [{change.low:+.5f}, {change.high:+.5f}]" in found.texts
    for arm in (made.proof.plain, made.proof.calibrated):
        assert f"{arm.mean:.5f} [" in told and f"{arm.mean_detail:.1%} [" in told
    assert {"4.0 MB", "0.5 MB", f"{made.bits:.3f}"} <= set(found.texts)
    assert f"{made.seconds / 60:.1f} minutes" in told
    assert "JAQ" not in found.texts


def test_every_layer_has_its_row_and_every_calibrated_one_its_bar(made):
    found = Tags(report_page(made, "t"))
    layers = made.weights.layers
    calibrated = {name: layer.errors for name, layer in layers.items() if layer.errors is not None}
    assert set(layers) <= set(found.texts) and 0 < len(calibrated) < len(layers)
    assert sum(tag == "g" for tag, _ in found.tags) == len(calibrated)
    for name, (plain, error) in calibrated.items():
        assert f"{name}, plain rounding {plain:.3g}, calibrated {error:.3g}" in found.texts
        assert f"{error:.5f}" in found.texts
    notes = {f"rounded plainly: {layer.note}" for layer in layers.values() if layer.note}
    assert notes and notes <= set(found.texts)


def test_all_three_versions_of_a_picture_can_be_chosen(made):
    found = Tags(report_page(made, "t"))
    images = [a for tag, a in found.tags if tag == "img"]
    assert [a["alt"] for a in images] == list(ARMS) * len(made.samples)
    chosen = [a["value"] for tag, a in found.tags if tag == "option" and "selected" in a]
    assert chosen == ["0", "2"] * len(made.samples)
    assert any(text.endswith(made.samples[0].prompt) for text in found.texts)


def test_a_caution_stands_below_the_verdict_and_texts_are_escaped(made):
    weights = replace(made.weights, provenance=dict(made.weights.provenance, remarks=[HOSTILE]))
    sample = replace(made.samples[0], prompt=HOSTILE)
    found = Tags(
        report_page(replace(made, weights=weights, samples=(sample,)), HOSTILE, None, ["x"])
    )
    cautions = [a for tag, a in found.tags if a.get("class") == "caution"]
    assert len(cautions) == 1 and sum(text.endswith(HOSTILE) for text in found.texts) >= 3
    assert "x" in found.texts


def test_where_plain_rounding_was_kept_it_says_so(made):
    """Plain and calibrated are exchanged: nothing is calibrated then."""
    proof = Proof(made.proof.calibrated, made.proof.plain)
    plain = {n: replace(layer, note="kept") for n, layer in made.weights.layers.items()}
    weights = RoundedWeights(plain, made.weights.chosen, made.weights.provenance)
    found = Tags(report_page(replace(made, weights=weights, proof=proof), "t", (9, 8_000_000)))
    assert any("plain rounding was kept" in text for text in found.texts)
    assert not any(tag == "g" for tag, _ in found.tags)
    assert "8.0 MB" in found.texts
