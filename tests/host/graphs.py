"""Graphs that differ from a plain one, each with a small random model and a feature of ComfyUI's.

Each gives a ``draw(sampler, sigmas=None)`` with everything else fixed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import inside  # noqa: F401  the pack becomes importable
import torch
from families import FLUX_SCHNELL as FLUX
from families import SD15 as UNET
from families import WAN, Small

from benchmarks import _families as real

comfy_sd = importlib.import_module("comfy.sd")
comfy_sample = importlib.import_module("comfy.sample")
samplers = importlib.import_module("comfy.samplers")
controlnet = importlib.import_module("comfy.controlnet")
custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
perp_neg = importlib.import_module("comfy_extras.nodes_perpneg")
differential = importlib.import_module("comfy_extras.nodes_differential_diffusion")
host = importlib.import_module("qsched_pack.nodes.host.sampling")
trajectories = importlib.import_module("qsched_pack.nodes.host.trajectories")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")

# As small as the models bear.
SD15, FLUX_SCHNELL = replace(UNET, latent=(1, 4, 8, 8)), replace(FLUX, latent=(1, 16, 8, 8))
STEPS, SEED = 4, 3
C_X, C_EPS = (0.9, 1.05, 0.97, 1.02), (1.1, 0.93, 1.04, 0.98)
SHARED = ("euler", "euler_ancestral", "lcm", "ddim", "dpmpp_2m", "dpmpp_sde")  # of ComfyUI's name
Draw = Callable[..., torch.Tensor]


def conditioning(small: Small, seed: int = 1) -> list:
    random = torch.Generator().manual_seed(seed)
    (entry,) = small.conditioning()
    return [[torch.randn(entry[0].shape, generator=random), dict(entry[1])]]


def drawing(model, positive, negative=None, cfg=1.0, shape=None, guider=None, mask=None) -> Draw:
    """``draw(sampler, sigmas=None)`` with everything else fixed; the latent is not empty if masked."""
    latent = torch.zeros(shape)
    if mask is not None:
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(9))

    def draw(sampler, sigmas=None) -> torch.Tensor:
        used = guider
        if used is None:
            used = samplers.CFGGuider(model)
            used.set_conds(positive, positive if negative is None else negative)
            used.set_cfg(cfg)
        noise = comfy_sample.prepare_noise(latent, SEED)
        levels = levels_of(model) if sigmas is None else sigmas
        return used.sample(
            noise, latent, sampler, levels, denoise_mask=mask, disable_pbar=True, seed=SEED
        )

    draw.model, draw.latent, draw.mask = model, latent, mask
    return draw


def levels_of(model) -> torch.Tensor:
    return trajectories.sigmas_and_flow(model, "simple", STEPS)[0]


def schedule_of(model, solver: str, c_x=C_X, c_eps=C_EPS):
    trajectory = trajectories.trajectory_of(model, solver, "simple", STEPS)
    return schedules.QSchedule(trajectory, corrections.ScalarCorrection(c_x, c_eps))


def ours(draw: Draw, solver: str, c_x=C_X, c_eps=C_EPS):
    return host.make_sampler(schedule_of(draw.model, solver, c_x, c_eps), solver, "strict")


def plain(files, small: Small):
    return files(small)


def left_half(shape) -> torch.Tensor:
    """0 (known) on the left half, 1 on the right."""
    mask = torch.ones(shape[0], 1, *shape[2:])
    mask[..., : shape[-1] // 2] = 0
    return mask


def with_cfg(files):
    return drawing(plain(files, SD15), conditioning(SD15), conditioning(SD15, 2), 5.0, SD15.latent)


def basic_guider(files):
    model = plain(files, SD15)
    guider = custom.Guider_Basic(model)
    guider.set_conds(conditioning(SD15))
    return drawing(model, None, shape=SD15.latent, guider=guider)


def dual_guider(files):
    model = plain(files, SD15)
    guider = custom.Guider_DualCFG(model)
    guider.set_conds(conditioning(SD15), conditioning(SD15, 2), conditioning(SD15, 3))
    guider.set_cfg(3.0, 2.0)
    return drawing(model, None, shape=SD15.latent, guider=guider)


def perp_neg_guider(files):
    model = plain(files, SD15)
    guider = perp_neg.Guider_PerpNeg(model)
    guider.set_conds(conditioning(SD15), conditioning(SD15, 2), conditioning(SD15, 3))
    guider.set_cfg(3.0, 1.0)
    return drawing(model, None, shape=SD15.latent, guider=guider)


def control(files):
    """A ControlNet of the small model's shape, found by ComfyUI's own detection."""
    config = {k: v for k, v in SD15.family.config.items() if k != "out_channels"}
    module = importlib.import_module("comfy.cldm.cldm").ControlNet(**config, hint_channels=3)
    random = torch.Generator().manual_seed(4)
    state = {
        k: real.random_weight(k, tuple(v.shape), random) for k, v in module.state_dict().items()
    }
    net = controlnet.load_controlnet_state_dict(state)
    hint = torch.rand(1, 3, 64, 64, generator=random)
    positive = conditioning(SD15)
    positive[0][1]["control"] = net.copy().set_cond_hint(hint, 0.8, (0.0, 1.0))
    positive[0][1]["control_apply_to_uncond"] = True
    return drawing(plain(files, SD15), positive, conditioning(SD15, 2), 3.0, SD15.latent)


def lora(files):
    random, weights = torch.Generator().manual_seed(5), {}
    for key, value in SD15.weights().items():
        if key.endswith("attn2.to_k.weight"):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=random)
            weights[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=random)
    model = comfy_sd.load_lora_for_models(plain(files, SD15), None, weights, 0.1, 0)[0]
    return drawing(model, conditioning(SD15), shape=SD15.latent)


def attention_patch(files):
    """What IP-Adapter packs do: more keys and values, and an addition to the attention's output."""
    model = plain(files, SD15).clone()
    model.set_model_attn2_patch(lambda q, k, v, extra: (q, k * 1.1, v + 0.1))
    model.set_model_attn2_output_patch(lambda out, extra: out * 1.05)
    return drawing(model, conditioning(SD15), shape=SD15.latent)


def batch_of_three(files):
    return drawing(plain(files, SD15), conditioning(SD15), shape=(3, *SD15.latent[1:]))


def not_square(files):
    return drawing(plain(files, SD15), conditioning(SD15), shape=(1, 4, 4, 12))


def flow(files):
    return drawing(
        plain(files, FLUX_SCHNELL), conditioning(FLUX_SCHNELL), shape=FLUX_SCHNELL.latent
    )


def video(files):
    return drawing(plain(files, WAN), conditioning(WAN), conditioning(WAN, 2), 2.0, WAN.latent)


def inpainting(files):
    mask = left_half(SD15.latent)
    return drawing(plain(files, SD15), conditioning(SD15), shape=SD15.latent, mask=mask)


def inpainting_flow(files):
    mask, model = left_half(FLUX_SCHNELL.latent), plain(files, FLUX_SCHNELL)
    return drawing(model, conditioning(FLUX_SCHNELL), shape=FLUX_SCHNELL.latent, mask=mask)


def inpainting_video(files):
    mask = left_half(WAN.latent)
    return drawing(plain(files, WAN), conditioning(WAN), shape=WAN.latent, mask=mask)


def differential_diffusion(files):
    mask = torch.linspace(0, 1, SD15.latent[-1]).expand(1, 1, *SD15.latent[2:]).clone()
    mask[..., :3] = 0
    model = differential.DifferentialDiffusion.execute(plain(files, SD15)).args[0]
    return drawing(model, conditioning(SD15), shape=SD15.latent, mask=mask)


MASKED = (inpainting, inpainting_flow, inpainting_video, differential_diffusion)
GRAPHS = (
    with_cfg, basic_guider, dual_guider, perp_neg_guider, control, lora, attention_patch,
    batch_of_three, not_square, flow, video, *MASKED,
)  # fmt: skip
ONES = (1.0,) * STEPS


def same_within(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    return ((found - wanted).abs().max() <= tolerance * wanted.abs().max()).item()
