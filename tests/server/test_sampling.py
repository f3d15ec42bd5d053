"""Sampling through the real server: the drop-in replacement, masks, img2img, other step counts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from devtools.server import ServerError


def graph(**ksampler) -> dict:
    """The unquantized demo model, a ramp schedule, KSampler (Q-Sched), and a saved picture."""
    common = {"scheduler": "simple", "steps": 4}
    return {
        "1": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "qsched_demo.safetensors"},
        },
        "2": {
            "class_type": "CLIPTextEncode",
            "inputs": {
                "clip": ["1", 1],
                "text": "a red circle above a green square on a white background",
            },
        },
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 96, "height": 96, "batch_size": 2},
        },
        "5": {"class_type": "QSchedRamp", "inputs": ramp(1.0, 1.0)},
        "6": {
            "class_type": "QSchedKSampler",
            "inputs": {
                "model": ["1", 0],
                "schedule": ["5", 0],
                "seed": 5,
                "cfg": 1.0,
                "solver": "euler",
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "denoise": 1.0,
                **common,
                **ksampler,
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {
            "class_type": "SaveImage",
            "inputs": {"images": ["7", 0], "filename_prefix": "sampling"},
        },
    }


def ramp(x_start: float, eps_start: float, **other) -> dict:
    return {
        "model": ["1", 0], "solver": "euler", "scheduler": "simple", "steps": 4,
        "x_start": x_start, "x_end": 1.0, "eps_start": eps_start, "eps_end": 1.0, **other,
    }  # fmt: skip


def as_core(prompt: dict) -> dict:
    """The same graph with core's KSampler in the place of ours."""
    node = prompt["6"]
    inputs = {k: v for k, v in node["inputs"].items() if k not in ("schedule", "solver", "mode")}
    inputs["sampler_name"] = node["inputs"]["solver"]
    core = {"class_type": "KSampler", "inputs": inputs}
    return {k: v for k, v in prompt.items() if k != "5"} | {"6": core}


def pictures(server, prompt: dict, node: str = "8") -> list[np.ndarray]:
    entry = server.run(prompt, timeout=300)
    return [
        np.asarray(Image.open(io.BytesIO(server.image(image))).convert("RGB"))
        for image in entry["outputs"][node]["images"]
    ]


def same(a, b) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "solver", ["euler", "euler_ancestral", "lcm", "ddim", "dpmpp_2m", "dpmpp_sde"]
)
def test_coefficients_of_one_give_ksamplers_own_pictures(server, solver):
    prompt = graph(solver=solver)
    prompt["5"]["inputs"]["solver"] = solver
    assert same(pictures(server, prompt), pictures(server, as_core(prompt)))


def test_img2img_at_one_is_ksamplers_own(server):
    prompt = graph(denoise=0.6)
    prompt["4"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}}
    prompt["9"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 96, "batch_size": 1, "color": 0x3060C0},
    }
    assert same(pictures(server, prompt), pictures(server, as_core(prompt)))


def test_coefficients_change_the_picture(server):
    prompt = graph()
    plain = pictures(server, prompt)
    prompt["5"]["inputs"] = ramp(0.9, 1.1)
    assert not same(plain, pictures(server, prompt))


def test_sampler_custom_advanced_equals_the_ksampler(server):
    prompt = graph()
    prompt["5"]["inputs"] = ramp(0.95, 1.05)
    expected = pictures(server, prompt)
    prompt["20"] = {
        "class_type": "QSchedSampler",
        "inputs": {"schedule": ["5", 0], "solver": "euler"},
    }
    prompt["21"] = {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
    }
    prompt["22"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}}
    prompt["23"] = {
        "class_type": "BasicGuider",
        "inputs": {"model": ["1", 0], "conditioning": ["2", 0]},
    }
    prompt["6"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["22", 0],
            "guider": ["23", 0],
            "sampler": ["20", 0],
            "sigmas": ["21", 0],
            "latent_image": ["4", 0],
        },
    }
    assert same(pictures(server, prompt), expected)


def test_known_pixels_survive_any_coefficients(server):
    """Inpainting: where the mask is 0 the latent is the encoded picture's, whatever c is."""
    prompt = graph()
    prompt["4"]["inputs"]["batch_size"] = 1
    prompt["9"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 96, "batch_size": 1, "color": 0x3060C0},
    }
    prompt["10"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}}
    prompt["11"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 96, "height": 96}}
    prompt["12"] = {
        "class_type": "SetLatentNoiseMask",
        "inputs": {"samples": ["10", 0], "mask": ["11", 0]},
    }
    prompt["5"]["inputs"] = ramp(0.8, 1.2, x_end=0.9, eps_end=1.1)
    prompt["6"]["inputs"]["latent_image"] = ["12", 0]
    untouched = dict(prompt)
    untouched["7"] = {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}}
    (masked,), (plain,) = pictures(server, prompt), pictures(server, untouched)
    assert np.abs(masked.astype(int) - plain.astype(int)).max() <= 1


def test_strict_refuses_other_step_counts_and_interpolate_runs(server):
    prompt = graph(steps=6, mode="strict")
    prompt["5"]["inputs"] = ramp(0.9, 1.1)
    with pytest.raises(ServerError, match="not learned"):
        server.run(prompt, timeout=300)
    prompt["6"]["inputs"]["mode"] = "interpolate"
    assert len(pictures(server, prompt)) == 2


def test_a_schedule_travels_through_a_file(server):
    prompt = graph()
    prompt["5"]["inputs"] = ramp(0.93, 1.07)
    expected = pictures(server, prompt)
    server.run(
        {
            "1": prompt["1"],
            "5": prompt["5"],
            "9": {
                "class_type": "QSchedSaveSchedule",
                "inputs": {"schedule": ["5", 0], "name": "travels", "overwrite": True},
            },
        }
    )
    prompt["5"] = {"class_type": "QSchedLoadSchedule", "inputs": {"schedule_name": "travels.json"}}
    assert same(pictures(server, prompt), expected)


def test_a_schedule_for_another_solver_warns_and_strict_refuses(server):
    prompt = graph(solver="lcm", mode="strict")
    prompt["5"]["inputs"] = ramp(0.9, 1.1)
    with pytest.raises(ServerError, match="solver 'euler', not 'lcm'"):
        server.run(prompt, timeout=300)


def advanced(prompt: dict, **inputs) -> dict:
    """The graph with KSampler Advanced (Q-Sched) in the place of KSampler (Q-Sched)."""
    old = prompt["6"]["inputs"]
    kept = {k: v for k, v in old.items() if k not in ("seed", "denoise")}
    new = {
        "add_noise": "enable", "noise_seed": old["seed"], "start_at_step": 0, "end_at_step": 10000,
        "return_with_leftover_noise": "disable", **kept, **inputs,
    }  # fmt: skip
    return prompt | {"6": {"class_type": "QSchedKSamplerAdvanced", "inputs": new}}


def advanced_as_core(prompt: dict) -> dict:
    return {
        key: as_core({"6": node})["6"] | {"class_type": "KSamplerAdvanced"}
        if node["class_type"] == "QSchedKSamplerAdvanced"
        else node
        for key, node in prompt.items()
        if node["class_type"] != "QSchedRamp"
    }


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"start_at_step": 1},
        {"end_at_step": 3, "return_with_leftover_noise": "enable"},
        {"end_at_step": 3},
        {"add_noise": "disable", "start_at_step": 2},
        {"start_at_step": 4},
    ],
    ids=str,
)
def test_the_advanced_ksampler_at_one_is_ksampler_advanceds_own(server, steps):
    prompt = advanced(graph(), **steps)
    assert same(pictures(server, prompt), pictures(server, advanced_as_core(prompt)))


def test_two_advanced_ksamplers_make_the_picture_of_one(server):
    prompt = graph(mode="strict")
    prompt["5"]["inputs"] = ramp(0.9, 1.1)
    expected = pictures(server, prompt)
    first = advanced(prompt, end_at_step=2, return_with_leftover_noise="enable")
    second = advanced(prompt, add_noise="disable", start_at_step=2)["6"]
    second["inputs"] = second["inputs"] | {"latent_image": ["6", 0]}
    both = first | {"16": second}
    both["7"] = {"class_type": "VAEDecode", "inputs": {"samples": ["16", 0], "vae": ["1", 2]}}
    assert same(pictures(server, both), expected)


def test_options_reach_the_solver_and_bad_ones_are_refused(server):
    prompt = graph(solver="tcd", gamma=0.0)
    prompt["5"]["inputs"] = ramp(0.95, 1.05, solver="tcd")
    calm = pictures(server, prompt)
    prompt["6"]["inputs"]["gamma"] = 1.0
    assert not same(calm, pictures(server, prompt))
    prompt["6"]["inputs"]["solver"] = "euler"
    with pytest.raises(ServerError, match=r"gamma=1.0 is no option of solver euler"):
        server.run(prompt)
    prompt["6"]["inputs"] |= {"solver": "tcd", "gamma": 1.5}
    with pytest.raises(ServerError, match="gamma"):
        server.run(prompt)


def test_around_a_sampler_node(server):
    """ComfyUI's own euler, corrected from outside, makes the picture of the corrected euler."""
    prompt = graph()
    prompt["5"]["inputs"] = ramp(0.95, 1.05)
    expected = pictures(server, prompt)
    core = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    around = {
        "class_type": "QSchedAroundSampler",
        "inputs": {"schedule": ["5", 0], "sampler": ["19", 0]},
    }
    levels = {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}
    prompt |= {
        "19": core,
        "20": around,
        "21": {"class_type": "BasicScheduler", "inputs": levels},
        "6": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["1", 0], "add_noise": True, "noise_seed": 5, "cfg": 1.0,
                "positive": ["2", 0], "negative": ["3", 0], "sampler": ["20", 0],
                "sigmas": ["21", 0], "latent_image": ["4", 0],
            },
        },
    }  # fmt: skip
    for found, wanted in zip(pictures(server, prompt), expected, strict=True):
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_a_size_beyond_the_model_is_refused_with_the_size_it_can(server):
    prompt = graph()
    prompt["4"]["inputs"] |= {"width": 512, "height": 96}
    reason = r"qsched.ScheduleError: latent_image=512 x 96 is more than .* at most 256 x 256"
    with pytest.raises(ServerError, match=reason):
        server.run(prompt)


def test_without_a_schedule_it_is_the_plain_solver(server):
    prompt = graph()
    del prompt["5"], prompt["6"]["inputs"]["schedule"]
    assert same(pictures(server, prompt), pictures(server, as_core(prompt)))
    prompt["6"]["inputs"]["scheduler"] = "as learned"  # nothing was: the default of a new node
    assert same(pictures(server, prompt), pictures(server, as_core(graph())))


def test_as_learned_takes_steps_and_noise_levels_from_the_schedule(server):
    prompt = graph(scheduler="karras", steps=3)
    prompt["5"]["inputs"] = ramp(0.9, 1.1, scheduler="karras", steps=3)
    expected = pictures(server, prompt)
    prompt["6"]["inputs"] |= {"scheduler": "as learned", "steps": 4, "mode": "strict"}
    assert same(pictures(server, prompt), expected)
    prompt["6"]["inputs"]["denoise"] = (
        0.6  # two of its three steps, both learned: strict is content
    )
    assert not same(pictures(server, prompt), expected)


def test_a_ramp_made_by_hand_does_not_warn_at_another_denoise(server):
    start = len(server.log_tail(10**6))
    prompt = graph(denoise=0.6)
    prompt["5"]["inputs"] = ramp(0.9, 1.1)
    assert len(pictures(server, prompt)) == 2
    assert "not learned" not in server.log_tail(10**6)[start:]
    prompt["6"]["inputs"]["solver"] = "lcm"
    pictures(server, prompt)
    assert "solver 'euler', not 'lcm'" in server.log_tail(10**6)[start:]
