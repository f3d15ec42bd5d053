"""FLUX's and SD3's own text encoders through the nodes: a search and evaluations see KSampler's pictures.

No file says how large a T5 is, and ComfyUI builds the published one.  So a node of this test's own
gives ComfyUI's loader the small sizes; all else are the nodes that a user has.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from device import nearly
from PIL import Image
from safetensors.torch import save_file
from small_encoders import CONFIGS, FILES, KINDS, LONG
from test_calibration import SCORER, node

from devtools.server import ComfyServer

CALIBRATION = "a red circle\na blue ring above a green square"
HELDOUT = ("a cat", LONG, "two dogs on a hill")  # the second has more tokens than T5 pads to
LOADER = f"""
import comfy.sd
import folder_paths


class SmallEncoders:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"towers": ("STRING", {{}}), "type": ("STRING", {{}})}}}}

    def load(self, towers, type):
        paths = [
            folder_paths.get_full_path_or_raise("text_encoders", f"{{name}}.safetensors")
            for name in towers.split()
        ]
        kind = getattr(comfy.sd.CLIPType, type)
        return (comfy.sd.load_clip(paths, clip_type=kind, model_options={CONFIGS!r}),)


NODE_CLASS_MAPPINGS = {{"SmallEncoders": SmallEncoders}}
"""


@pytest.fixture(scope="module")
def encoders(
    comfy_in_process, comfyui_path, server_base, server_args, tmp_path_factory
) -> ComfyServer:
    """A server with the small files and the node that loads them."""
    families = importlib.import_module("families")
    base = tmp_path_factory.mktemp("encoders")
    shutil.copytree(server_base / "models", base / "models", copy_function=os.link)
    for folder, files in (
        ("text_encoders", FILES),
        ("diffusion_models", {"flux": families.FLUX_SCHNELL.weights, "sd3": families.SD3.weights}),
    ):
        (base / "models" / folder).mkdir(exist_ok=True)
        for name, make in files.items():
            save_file(make(), base / "models" / folder / f"{name}.safetensors")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "small_encoders.py").write_text(LOADER, encoding="utf-8")
    with ComfyServer(comfyui_path, base, extra_args=server_args) as server:
        yield server
    shutil.rmtree(base / "models")  # half a gigabyte


def loaded(kind: str) -> dict:
    """1 is a model in 4 bits, 2 its encoders in 8, 3 a VAE."""
    clip_type, towers = KINDS[kind]
    return {
        "1": node("QSchedLoadDiffusionModel", unet_name=f"{kind}.safetensors", weight_format="nf4"),
        "20": node("SmallEncoders", towers=" ".join(towers), type=clip_type),
        "2": node("QSchedQuantizeTextEncoder", clip=["20", 0], weight_format="int8"),
        "3": node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors"),
    }


def searched(kind: str) -> dict:
    """4 is a search, 5 an evaluation without a schedule, 6 one with what was learned."""
    common = {
        "model": ["1", 0], "clip": ["2", 0], "vae": ["3", 2], "prompts": ["8", 0],
        "objective": ["9", 0], "solver": "euler", "scheduler": "simple", "steps": 2, "cfg": 2.0,
        "width": 96, "height": 96, "negative": "a",
    }  # fmt: skip
    prompt = loaded(kind) | {
        "8": node(
            "QSchedCalibrationPrompts", source="text", seed=3,
            calibration=CALIBRATION, heldout="\n".join(HELDOUT),
        ),
        "9": node("QSchedJAQObjective", clip_name=SCORER, quality="clip_iqa", quality_weight=2.0),
        "4": node("QSchedJAQCalibrator", **common, search="gp", budget=5, seed=0, guard=False),
        "5": node("QSchedEvaluate", **common),
        "6": node("QSchedEvaluate", **common, schedule=["4", 0]),
    }  # fmt: skip
    for evaluation in "56":
        prompt[f"7{evaluation}"] = node(
            "SaveImage", images=[evaluation, 1], filename_prefix=f"{kind}-{evaluation}"
        )
    return prompt


def alone(prompt: dict, seeds: list[int]) -> dict:
    """For each held-out prompt and its seed: core's KSampler and ours, both for it alone."""
    prompt |= {
        "30": node("CLIPTextEncode", clip=["2", 0], text="a"),
        "31": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
    }
    for row, (text, seed) in enumerate(zip(HELDOUT, seeds, strict=True)):
        prompt[f"32{row}"] = node("CLIPTextEncode", clip=["2", 0], text=text)
        common = {
            "model": ["1", 0], "positive": [f"32{row}", 0], "negative": ["30", 0],
            "latent_image": ["31", 0], "seed": seed, "steps": 2, "cfg": 2.0,
            "scheduler": "simple", "denoise": 1.0,
        }  # fmt: skip
        samplers = {
            "5": node("KSampler", **common, sampler_name="euler"),
            "6": node("QSchedKSampler", **common, solver="euler", schedule=["4", 0]),
        }
        for name, sampler in samplers.items():
            prompt |= {
                f"4{name}{row}": sampler,
                f"5{name}{row}": node("VAEDecode", samples=[f"4{name}{row}", 0], vae=["3", 2]),
                f"6{name}{row}": node(
                    "SaveImage", images=[f"5{name}{row}", 0], filename_prefix=f"alone-{name}{row}"
                ),
            }
    return prompt


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd3", marks=pytest.mark.full)])
def test_each_prompt_has_the_picture_that_ksampler_makes_for_it_alone(encoders, kind):
    prompt = searched(kind)
    entry = encoders.run(prompt)
    reports = {name: json.loads(entry["outputs"][name]["text"][0]) for name in "456"}
    for name, scored in (("5", "scores_before"), ("6", "scores_after")):
        found, wanted = reports[name]["scores"], reports["4"]["heldout"][scored]
        assert found["jaq"] == nearly(wanted["jaq"], 1e-3)
    assert json.loads(reports["4"]["schedule"])["correction"]["c_eps"] != [1.0, 1.0]
    assert reports["5"]["prompts"] == list(HELDOUT)

    outputs = encoders.run(alone(prompt, reports["5"]["seeds"]))["outputs"]

    def pixels(name: str) -> list[np.ndarray]:
        files = (encoders.image(image) for image in outputs[name]["images"])
        return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), int) for file in files]

    for name in "56":
        together = pixels(f"7{name}")
        for row, text in enumerate(HELDOUT):
            (wanted,) = pixels(f"6{name}{row}")
            assert abs(together[row] - wanted).max() <= 2, (name, text[:20])
            assert wanted.std() > 5
    changes = [abs(a - b).max() for a, b in zip(pixels("75"), pixels("76"), strict=True)]
    assert min(changes) > 2  # what was learned matters to every picture
