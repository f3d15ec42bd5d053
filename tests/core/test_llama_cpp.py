"""llama.cpp's quantizers beside ours: the library by ctypes, and what the benchmark makes of it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rounding_task import net, task

from benchmarks import _llama_cpp
from benchmarks._ggml import FALLBACKS, Ggml, fallback, library
from benchmarks._llama_cpp import QUANTIZERS, Measured, Setting
from devtools.console import SetupError
from qsched_core.formats.policy import Choice, Policy
from qsched_core.prompts import CalibrationPrompts
from qsched_core.rounding import TaskSubject, choices
from qsched_core.rounding.proof import Arm

PROMPTS = CalibrationPrompts.of(["a", "bc", "d"], ["e", "f"])
LAYERS = Policy("int2", min_weights=1)
SPARED = Choice("nf4", weight_only=True)


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    try:
        return Ggml(library())
    except SetupError as error:
        pytest.skip(f"ggml can't be built here: {error}")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("quantizer", "columns", "wanted"),
    [
        ("Q2_K", 256, "Q2_K"),
        ("Q2_K", 320, "Q4_0"),
        ("IQ2_S", 1280 + 32, "IQ4_NL"),
        ("Q4_K", 96, "Q5_0"),
        ("Q4_K", 100, "F16"),
        ("Q4_0", 33, "F16"),
    ],
)
def test_rows_that_fill_no_block_get_what_llama_cpp_gives_them(quantizer, columns, wanted):
    assert fallback(quantizer, columns) == wanted


def test_modulation_is_spared_unless_all_is_said():
    plain, every = Setting("IQ2_S", True), Setting("IQ2_S", True, all=True)
    assert [s.type_of(SPARED, 256) for s in (plain, every)] == ["Q4_K", "IQ2_S"]
    assert [s.type_of(Choice("int2"), 256) for s in (plain, every)] == ["IQ2_S", "IQ2_S"]
    assert plain.type_of(SPARED, 320) == "Q5_0"
    assert (plain.name, every.name) == ("iq2_s.imatrix", "iq2_s.imatrix.all")


def test_importance_is_the_mean_square_of_what_each_layer_is_given():
    model = net()
    layer = model.blocks[1].q
    subject = TaskSubject(task(model))
    found = _llama_cpp.importance(subject, choices(model, LAYERS), PROMPTS.calibration)
    seen = []
    hook = layer.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].flatten(0, 1))
    )
    states = subject.states(PROMPTS.calibration, 0, 0)
    for k in range(len(states)):  # one by one: batches must make no difference
        states.run(slice(k, k + 1))
    hook.remove()
    wanted = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blocks.1.q"]), wanted)
    assert "blocks.1.unused" not in found


def result(bits: float, distance: float):
    arm = Arm((distance, distance + 1e-6), (1.0, 1.0), (5.0, 5.1))
    return SimpleNamespace(bits=bits, proof=SimpleNamespace(calibrated=arm))


def measured(quantizer: str, bits: float, distance: float, importance: bool = True) -> Measured:
    arm = Arm((distance, distance), (1.0, 1.0), (4.0, 4.2))
    return Measured(Setting(quantizer, importance), arm, bits, {quantizer: 3})


def rows(monkeypatch, results, *found: Measured):
    monkeypatch.setattr(_llama_cpp, "library", lambda: None)
    monkeypatch.setattr(_llama_cpp, "Ggml", lambda path: None)
    monkeypatch.setattr(_llama_cpp, "measured", lambda *given: found)
    return {row.id: row for row in _llama_cpp.compare(results, PROMPTS, None)}


def test_the_headline_takes_their_best_that_is_not_smaller_than_ours(monkeypatch):
    found = rows(
        monkeypatch,
        {"int2": result(3.0, 0.01)},
        measured("IQ2_S", 2.5, 0.001),  # nearer, but smaller than ours: another size class
        measured("IQ2_S", 3.2, 0.04, importance=False),
        measured("IQ2_S", 3.2, 0.02),
    )
    row = found["bits.int2_vs_iq2_s"]
    assert row.other == 0.02 and row.ratio == pytest.approx(0.5, rel=1e-3)
    assert row.bound == "<= 0.35" and row.met is False
    assert "with importance matrix (3.200 bits: 3 x IQ2_S)" in row.what
    assert "bits.int3_vs_q4_k" not in found  # int3 was not run


def test_each_quantizer_stands_beside_the_nearest_of_ours_at_no_more_bits(monkeypatch):
    ours = {"int2": result(3.0, 0.01), "int3": result(3.7, 0.002), "nf4": result(4.1, 0.003)}
    found = rows(monkeypatch, ours, measured("Q4_K", 4.5, 0.004), measured("Q2_K", 2.6, 0.05))
    near, small = found["ggml.q4_k.imatrix.bits"], found["ggml.q2_k.imatrix.bits"]
    assert (near.ours, near.other) == (3.7, 4.5)
    assert (small.ours, small.other) == (3.0, 2.6)  # none of ours is as small, and the row shows it
    assert found["ggml.q4_k.imatrix.distance"].ratio == pytest.approx(0.5, rel=1e-3)
    assert 0 < found["ggml.q4_k.imatrix.jaq"].ratio < 1


def test_without_the_library_the_rows_say_why(monkeypatch, capsys):
    def fail():
        raise SetupError("no compiler")

    monkeypatch.setattr(_llama_cpp, "library", fail)
    found = _llama_cpp.compare({"int3": result(3.7, 0.001)}, PROMPTS, None)
    assert [(row.id, row.skipped, row.met) for row in found] == [
        ("bits.int3_vs_q4_k", "no compiler", None)
    ]
    assert "left out: no compiler" in capsys.readouterr().out


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("make")), reason="needs cmake and make"
)
def test_a_missing_compiler_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(SetupError, match="no C and C"):
        library(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ggml.log"]


@pytest.mark.full
@pytest.mark.parametrize("quantizer", sorted({*QUANTIZERS, *FALLBACKS.values(), "F16"}))
def test_packed_weights_read_the_same_in_ggml_and_in_gguf(ggml, quantizer):
    import gguf

    kind = gguf.GGMLQuantizationType[quantizer]
    weight, counts = random(8, 512), np.random.default_rng(1).random(512) ** 4 + 1e-3
    errors = {}
    for importance in (None, counts):
        if importance is None and ggml.requires_importance(quantizer):
            continue
        packed = ggml.quantize(weight, quantizer, importance)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        assert packed.shape == (8, 512 // block * size)
        values = ggml.dequantize(packed, quantizer)
        np.testing.assert_array_equal(values, gguf.dequantize(packed, kind))
        errors[importance is None] = float((((values - weight) ** 2) * counts).sum())
        assert errors[importance is None] < 0.25 * float((weight**2 * counts).sum())
    if len(errors) == 2 and quantizer not in ("Q8_0", "F16"):  # those two know no importance
        assert errors[False] < errors[True]


@pytest.mark.full
def test_what_would_end_the_process_is_refused(ggml):
    assert ggml.requires_importance("IQ2_XXS") and not ggml.requires_importance("Q4_K")
    with pytest.raises(ValueError, match="needs an importance matrix"):
        ggml.quantize(random(2, 256), "IQ2_XXS")
    with pytest.raises(ValueError, match="320 columns"):
        ggml.quantize(random(2, 320), "Q4_K")
    with pytest.raises(ValueError, match="NaN"):
        ggml.quantize(random(2, 256) * np.inf, "Q4_K")
    for wrong in (np.ones(255), -np.ones(256), np.full(256, np.nan)):
        with pytest.raises(ValueError, match="256 finite numbers"):
            ggml.quantize(random(2, 256), "Q4_K", wrong)
    with pytest.raises(ValueError, match="no packing of Q4_K"):
        ggml.dequantize(np.zeros((2, 145), np.uint8), "Q4_K")


@pytest.mark.full
def test_a_task_is_rounded_in_place_and_its_bits_are_counted(ggml):
    model = net()  # 64 columns: no whole block of 256, one of 32
    subject, chosen = TaskSubject(task(model)), choices(model, LAYERS)
    chosen = {name: choice for name, choice in chosen.items() if "unused" not in name}
    counts = _llama_cpp.importance(subject, chosen, PROMPTS.calibration)
    before = model.blocks[0].q.weight.clone()
    bits, types = _llama_cpp.quantize(ggml, subject, chosen, counts, Setting("Q4_K", True))
    assert bits == pytest.approx(5.5) and types == {"Q5_0": len(chosen)}
    change = (model.blocks[0].q.weight - before).norm() / before.norm()
    assert 0 < change < 0.05
