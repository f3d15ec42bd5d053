"""The demo's world: captions a model can read, splits that hold, and what is shipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demo import graphs, run
from demo.degrade import TRAINED, UNSEEN, degrade
from demo.prompts import SIZES, demo_prompts
from demo.shapes import COLOURS, KIND_WEIGHTS, all_scenes, render, sample_scenes, split
from demo.text import END_OF_TEXT, MAX_TOKENS, context_of, tokenize


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_every_caption_fits_the_text_encoder(kind):
    captions = [scene.caption() for scene in all_scenes(kind)[:: 1 + len(all_scenes(kind)) // 2000]]
    ids = tokenize(captions)
    assert (ids[:, MAX_TOKENS:] == END_OF_TEXT).all()
    assert len(set(captions)) == len(captions)


def test_the_pads_are_one_vector():
    context = context_of(tokenize(["a red circle", ""]))
    assert torch.equal(context[0, -1], context[1, -1])


def test_training_and_held_out_scenes_are_disjoint():
    for kind in KIND_WEIGHTS:
        train, held = split(kind, False), split(kind, True)
        assert not set(train) & set(held)
        assert 0.05 < len(held) / (len(train) + len(held)) < 0.2


def test_pictures_show_their_colours():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(16, rng)
    images = render(scenes, rng)
    for scene, image in zip(scenes, images, strict=True):
        for colour in (scene.background, *(colour for colour, _ in scene.things)):
            target = torch.tensor(COLOURS[colour])[:, None, None] / 255
            nearest = (image - target).abs().amax(0).min()
            assert nearest < 0.05, (scene.caption(), colour)


@pytest.mark.parametrize("kind", TRAINED + UNSEEN)
def test_every_degradation_changes_a_picture_and_stays_in_range(kind):
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    images = render(sample_scenes(8, rng), rng)
    damaged = degrade(images, kinds=(kind,))
    assert damaged.shape == images.shape
    assert damaged.min() >= 0 and damaged.max() <= 1
    assert (damaged - images).abs().amax((1, 2, 3)).min() > 0.02


def test_prompt_sets_are_disjoint_and_held_out_of_training():
    prompts = demo_prompts()
    sets = [set(getattr(prompts, name)) for name in SIZES]
    assert [len(s) for s in sets] == list(SIZES.values())
    assert len(set.union(*sets)) == sum(SIZES.values())
    trained = {scene.caption() for kind in KIND_WEIGHTS for scene in split(kind, False)}
    assert not trained & set.union(*sets)


def test_the_shipped_workflow_has_the_demos_prompts():
    inputs = graphs.shipped()["2"]["inputs"]
    prompts = demo_prompts()
    assert inputs["calibration"].splitlines() == list(prompts.calibration)
    assert inputs["heldout"].splitlines() == list(prompts.heldout)


def test_the_shipped_weights_stay_below_40_mb(repo_root):
    files = list((repo_root / "demo" / "weights").iterdir())
    assert {f.name for f in files} == {f"{n}.safetensors" for n in ("mmdit", "vae", "scorer")}
    assert sum(f.stat().st_size for f in files) < 40e6


@pytest.mark.parametrize("weight_format", ["unquantized", "nf4", "int2"])
def test_every_graph_of_the_demo_shares_text_encoder_and_vae(weight_format):
    """ComfyUI keeps the outputs of a node that the next graph has too, and drops all others."""
    made = (
        graphs.learn(weight_format, "gp", True, "name"),
        graphs.evaluate(weight_format, "name.json", ("a",), 0, "prefix"),
    )
    for graph in made:
        links = [
            node["inputs"][name]
            for node in graph.values()
            for name in ("clip", "vae")
            if name in node["inputs"]
        ]
        assert len(links) >= 2
        for node, _ in links:
            assert graph[node] == graphs.loader("unquantized")
        assert graph["4"]["inputs"]["model"] == ["1", 0]
        assert graph["1"]["class_type"] == graphs.loader(weight_format)["class_type"]


@pytest.mark.parametrize(
    ("capabilities", "arguments"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, ("--bf16-vae",)),
        ({"amx_bf16": False, "avx512_bf16": True}, ("--bf16-vae",)),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, ()),
        ({}, ()),
    ],
)
def test_the_demos_vae_is_in_bf16_where_the_cpu_has_the_instructions(capabilities, arguments):
    assert run.vae_arguments(capabilities) == arguments


def test_the_demo_says_what_each_model_computed_in():
    row = run.Row("nf4", 1, "bfloat16", {})
    text = run.precisions([row], ("--cpu", "--bf16-vae"))
    assert "nf4 bfloat16" in text and "VAE bfloat16" in text
    assert "float32 on a CPU" in run.precisions([row], ("--cpu",))


def test_every_row_of_the_demos_table_is_named_and_compared():
    def row(name, jaq, over=None):
        made = run.Row(name, 5_000_000, "bfloat16", {"jaq": jaq}, distance=1.25)
        if over is not None:
            made.compare(over)
        return made

    plain = row("int2", (1.0, 2.0, 3.0))
    better = row("int2 calibrated", (2.0, 3.5, 4.0), plain)
    gain = better.gain["mean"]
    text = run.table([plain, better], {"controls": {"searched on x": better.gain}})
    assert f"{gain:+.3f}" in text and ", int2" in text and "searched on x: +1.167" in text


def test_the_demos_distance_is_in_levels():
    from PIL import Image

    one, other = (Image.new("RGB", (4, 4), (level,) * 3) for level in (10, 13))
    assert run.distance([one, one], [other, one]) == pytest.approx((9 / 2) ** 0.5)


def test_a_calibrated_model_of_the_demo_comes_from_its_file():
    graph = graphs.learn("int2", "gp", True, "name", "saved.safetensors")
    assert graph["1"]["class_type"] == "QSchedLoadDiffusionModel"
    assert graph["1"]["inputs"] == {"unet_name": "saved.safetensors", "weight_format": "int2"}
    made = graphs.calibrate_weights("int2", ("a", "b"), ("c",), "name")
    assert made["4"]["inputs"]["clip"] == [graphs.PARTS, 1]
