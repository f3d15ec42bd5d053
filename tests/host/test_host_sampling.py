"""The sampler in graphs that differ from a plain one, inside the real ComfyUI.

Each case draws with some small random model and a feature of ComfyUI's; the same must come out of
ComfyUI's own sampler and of ours at coefficients of 1, and known pixels must survive any.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import inside  # noqa: F401  the pack becomes importable
import pytest
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
prompt_sets = importlib.import_module("qsched_pack.qsched_core.prompts")
schedules = importlib.import_module("qsched_pack.qsched_core.schedule")
solvers = importlib.import_module("qsched_pack.qsched_core.solvers")
corrections = importlib.import_module("qsched_pack.qsched_core.correction")
candidates = importlib.import_module("qsched_pack.qsched_core.trajectory")
sources = importlib.import_module("qsched_pack.nodes.host.source")
save_file = importlib.import_module("safetensors.torch").save_file

# As small as the models bear.
SD15, FLUX_SCHNELL = replace(UNET, latent=(1, 4, 8, 8)), replace(FLUX, latent=(1, 16, 8, 8))
STEPS, SEED = 4, 3
C_X, C_EPS = (0.9, 1.05, 0.97, 1.02), (1.1, 0.93, 1.04, 0.98)
SHARED = ("euler", "euler_ancestral", "lcm", "ddim", "dpmpp_2m", "dpmpp_sde")  # of ComfyUI's name
Draw = Callable[..., torch.Tensor]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Callable[[Small], object]:
    """``files(small)``: a clone of its MODEL, which is loaded once."""
    folder, models = tmp_path_factory.mktemp("models"), {}

    def opened(small: Small):
        if small.name not in models:
            path = folder / f"{small.name}.safetensors"
            save_file(small.weights(), path)
            models[small.name] = comfy_sd.load_diffusion_model(str(path))
        return models[small.name].clone()

    return opened


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
    return host.sigmas_and_flow(model, "simple", STEPS)[0]


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
OTHERS = ("euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc", "dpmpp_2m_sde", "deis")


def same_within(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    return ((found - wanted).abs().max() <= tolerance * wanted.abs().max()).item()


# All solvers where the model's kind differs; what else a graph has they meet in the same place.
OWN = [(graph, "euler_ancestral") for graph in GRAPHS] + [
    pytest.param(graph, solver, marks=() if solver == "dpmpp_sde" else pytest.mark.full)
    for graph in (with_cfg, flow)
    for solver in SHARED
    if solver != "euler_ancestral"
]


@pytest.mark.parametrize(
    ("graph", "solver"), OWN, ids=lambda value: getattr(value, "__name__", value)
)
def test_ones_give_comfyuis_own_latent_and_others_do_not(graph, solver, files):
    draw = graph(files)
    core = draw(samplers.sampler_object(solver))
    assert torch.isfinite(core).all() and core.std() > 0.05
    assert torch.equal(draw(ours(draw, solver, ONES, ONES)), core)
    moved = draw(ours(draw, solver))
    assert torch.isfinite(moved).all()
    assert not same_within(moved, core, 1e-3)
    assert torch.equal(draw(ours(draw, solver)), moved), "the same seed, the same latent"


@pytest.mark.parametrize(
    ("graph", "solver"),
    [(inpainting_flow, solver) for solver in solvers.SOLVERS]
    + [(graph, "euler_ancestral") for graph in MASKED]
    + [(inpainting, "tcd")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_known_pixels_are_untouched_by_any_coefficients(graph, solver, files):
    draw = graph(files)
    found = draw(ours(draw, solver))
    known = (draw.mask == 0).expand_as(found)
    assert known.any() and not known.all()
    assert same_within(found[known], draw.latent[known], 2e-5)
    assert not same_within(found[~known], draw.latent[~known], 0.1)


def test_under_a_differential_mask_a_pixel_is_known_until_its_step(files):
    """While a pixel is known its latent is the picture's own, not one that coefficients moved."""
    draw, seen = differential_diffusion(files), []
    unmasked = ours(draw, "euler")
    around = unmasked.sampler_function

    def watched(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def keep(state):
            seen.append((float(state["sigma"]), state["x"].clone()))
            callback(state)

        return around(model, x, sigmas, extra_args, keep, disable)

    draw(samplers.KSAMPLER(watched))
    noise = comfy_sample.prepare_noise(draw.latent, SEED)
    sampling = draw.model.get_model_object("model_sampling")
    for index, (sigma, x) in enumerate(seen):
        mask = draw.model.model_options["denoise_mask_function"](
            torch.tensor([sigma]),
            draw.mask,
            extra_options={"model": _Inner(sampling), "sigmas": levels_of(draw.model)},
        )
        known = (mask == 0).expand_as(x)
        assert known.any(), index
        wanted = draw.model.model.process_latent_in(draw.latent) + sigma * noise
        # The first latent has a little more noise (ComfyUI's max_denoise).
        assert same_within(x[known], wanted[known], 1e-2), index


class _Inner:
    def __init__(self, sampling):
        self.inner_model = type("Inner", (), {"model_sampling": sampling})


AROUND = [(graph, name) for graph in (with_cfg, flow) for name in ("euler", "heun")] + [
    pytest.param(graph, name, marks=pytest.mark.full)
    for graph, names in (
        (flow, OTHERS[2:]),
        (with_cfg, ("uni_pc",)),
        (inpainting, ("euler", "heun", "uni_pc")),
        (video, ("euler", "heun", "uni_pc")),
    )
    for name in names
]


@pytest.mark.parametrize(
    ("graph", "name"), AROUND, ids=lambda value: getattr(value, "__name__", value)
)
def test_around_a_sampler_of_comfyuis(graph, name, files):
    draw = graph(files)

    def around(name: str, c_x=C_X, c_eps=C_EPS):
        schedule = schedule_of(draw.model, "euler", c_x, c_eps)
        return draw(
            host.make_around_sampler(schedule, samplers.sampler_object(name), "interpolate")
        )

    core = draw(samplers.sampler_object(name))
    assert torch.equal(around(name, ONES, ONES), core)
    moved = around(name)
    assert not same_within(moved, core, 1e-3)
    if name == "euler":
        assert same_within(moved, draw(ours(draw, "euler")), 1e-4)


def around_with(draw, sampler, options: dict, solver="euler_ancestral", mode="strict"):
    """Draw with a schedule of ``solver``, learned with ``options``, around ``sampler``."""
    trajectory = trajectories.trajectory_of(draw.model, solver, "simple", STEPS, options)
    learned = schedules.QSchedule(trajectory, corrections.ScalarCorrection(C_X, C_EPS))
    return draw(host.make_around_sampler(learned, sampler, mode))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_around_a_sampler_its_own_options_are_compared(eta, files, caplog):
    draw = with_cfg(files)
    same = samplers.ksampler("euler_ancestral", {"eta": eta, "s_noise": 1.0})
    assert torch.isfinite(around_with(draw, same, {"eta": eta})).all()
    if eta == 1.0:  # the sampler's own default
        around_with(draw, samplers.sampler_object("euler_ancestral"), {"eta": eta})
    assert not caplog.records
    other = samplers.ksampler("euler_ancestral", {"eta": 0.25})
    with pytest.raises(ValueError, match=f"eta {eta}, not 0.25"):
        around_with(draw, other, {"eta": eta})
    around_with(draw, other, {"eta": eta}, mode="interpolate")
    assert f"eta {eta}, not 0.25" in caplog.text


@pytest.mark.parametrize("name", ["heun", "uni_pc", "euler"])
def test_around_another_sampler_options_that_it_has_not_are_no_difference(name, files, caplog):
    around_with(with_cfg(files), samplers.sampler_object(name), {"eta": 0.5})
    assert not caplog.records


def test_around_comfyuis_ddim_a_schedule_of_a_random_one_differs(files):
    draw, ddim = with_cfg(files), samplers.sampler_object("ddim")
    assert torch.isfinite(around_with(draw, ddim, {"eta": 0.0}, "ddim")).all()
    with pytest.raises(ValueError, match=r"eta 0\.5, not 0"):
        around_with(draw, ddim, {"eta": 0.5}, "ddim")


def outcome(make) -> str:
    try:
        return str(make().tolist())  # NaN is NaN
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("scheduler", samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("small", [SD15, FLUX_SCHNELL], ids=lambda small: small.name)
def test_sigmas_are_ksamplers(small, scheduler, files):
    model = plain(files, small)
    differ = []
    for steps in range(1, 21):
        for denoise in (1.0, 0.99995, 0.9999, 0.95, 0.7, 0.5, 0.3):
            args = (model, steps, "cpu", "euler", scheduler, denoise)
            wanted = outcome(lambda args=args: samplers.KSampler(*args).sigmas)
            found = outcome(
                lambda s=steps, d=denoise: host.sigmas_and_flow(model, scheduler, s, d)[0]
            )
            if found != wanted:
                differ.append((steps, denoise))
    assert not differ


@pytest.mark.parametrize("steps", [4, 6])  # of 6, ddim_uniform makes 7
@pytest.mark.parametrize(("start", "end"), [(0, None), (2, 10_000), (0, 6), (1, 3)])
def test_the_ksampler_is_comfyuis_where_a_scheduler_makes_more_steps(steps, start, end, files):
    model, positive = plain(files, SD15), conditioning(SD15)
    latent = torch.zeros(SD15.latent)
    core = comfy_sample.sample(
        model, comfy_sample.prepare_noise(latent, SEED), steps, 1.0, "euler", "ddim_uniform",
        positive, positive, latent, start_step=start, last_step=end, force_full_denoise=True,
        seed=SEED, disable_pbar=True,
    )  # fmt: skip
    made = host.ksampler(
        model, schedules.QSchedule.identity(candidates.Trajectory.of((1.0, 0.0), flow=False)), "euler", "interpolate", None,
        seed=SEED, steps=steps, cfg=1.0, scheduler="ddim_uniform", positive=positive,
        negative=positive, latent={"samples": latent}, start=start, end=end,
    )  # fmt: skip
    assert torch.equal(made["samples"], core)


def test_a_distilled_models_timesteps_are_all_known(files):
    """ComfyUI keeps 50 of an LCM model's 1000 noise levels; TCD counts in all of them."""
    advanced = importlib.import_module("comfy_extras.nodes_model_advanced")
    model = plain(files, SD15)
    (lcm,) = advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    sampling = lcm.get_model_object("model_sampling")
    assert len(sampling.sigmas) == 50
    found = trajectories.solver_info(sampling, lcm.model.model_config).training_sigmas
    assert torch.equal(found, model.get_model_object("model_sampling").sigmas)
    draw = drawing(lcm, conditioning(SD15), shape=SD15.latent)
    assert torch.isfinite(draw(ours(draw, "tcd"))).all()


def test_nan_in_the_model_names_the_step(files):
    draw, calls = with_cfg(files), []

    def break_it(args):
        calls.append(args)
        return args["denoised"] * (torch.nan if len(calls) > 2 else 1)

    draw.model.set_model_sampler_post_cfg_function(break_it)
    with pytest.raises(ValueError, match="step 3 of 4"):
        draw(ours(draw, "euler"))


def test_nan_in_the_latent_is_named_before_the_first_step(files):
    draw = inpainting(files)
    draw.latent[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"latent.*NaN"):
        draw(ours(draw, "euler"))


@pytest.mark.parametrize(
    ("sigmas", "message"), [([1.0], "at least 2"), ([0.5, 0.9, 0.0], "must decrease")]
)
def test_sigmas_that_can_not_be_sampled(sigmas, message, files):
    draw = with_cfg(files)
    with pytest.raises(ValueError, match=message):
        draw(ours(draw, "euler"), torch.tensor(sigmas))


class Words:
    """A text encoder in two methods; prompts are numbers."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(SD15, int(tokens or 0))


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_sde"])
def test_the_pre_check_sees_the_latents_of_the_pictures(files, solver):
    """Each prompt has its own noise whatever is beside it, and every evaluation is counted."""
    model, steps = plain(files, SD15), 2
    trajectory = trajectories.trajectory_of(model, solver, "simple", steps)
    prompts = prompt_sets.PromptSet(("1", "2"), (11, 12))

    def seen(part):
        source = sources.ComfySource(model, Words(), None, trajectory, width=64, height=64)
        found = source.observed(part)
        each = 2 * steps - 1 if solver == "dpmpp_sde" else steps
        assert found.nfe == source.nfe == each * len(part)
        return found

    together, alone = seen(prompts), seen(prompts.part(1, 2))
    for many, one in zip(together.latents, alone.latents, strict=True):
        torch.testing.assert_close(many[1:], one, rtol=1e-3, atol=1e-3)


class Counted(Words):
    """Says how many texts it encoded."""

    def __init__(self):
        self.encoded: list[str] = []

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        self.encoded.append(tokens)
        return super().encode_from_tokens_scheduled(tokens)


def test_a_prompt_is_encoded_once_however_many_nodes_use_it(files):
    """A search, its control and an evaluation each have a source of their own."""
    model, clip = plain(files, SD15), Counted()
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)

    def observe(text_encoder, *prompts):
        sources.ComfySource(model, text_encoder, None, trajectory, width=64, height=64).observed(
            prompt_sets.PromptSet(prompts, tuple(range(len(prompts))))
        )

    observe(clip, "1", "2")
    observe(clip, "2", "3")
    assert clip.encoded == ["1", "2", "3"]
    other = Counted()
    observe(other, "1")
    assert other.encoded == ["1"], "what another text encoder gave is not this one's"
    clip.layer_idx = -2
    observe(clip, "1")
    assert clip.encoded == ["1", "2", "3", "1"], "it would give something else now"


class Decoder:
    """A VAE of one convolution on the CPU, and what it was given."""

    device = torch.device("cpu")

    def __init__(self):
        self.convolution = torch.nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.latents, self.made = latents, self.convolution(latents.to(self.device))
        larger = torch.nn.functional.interpolate(self.made, scale_factor=8)
        return larger.movedim(1, -1).sigmoid()


def test_a_vae_on_the_cpu_decodes_channels_last_to_the_same_pictures(files):
    model, vae = plain(files, SD15), Decoder()
    trajectory = trajectories.trajectory_of(model, "euler", "simple", 2)
    source = sources.ComfySource(model, Words(), vae, trajectory, width=64, height=64)
    identity = candidates.Candidate.identity(trajectory)
    found = source.images(prompt_sets.PromptSet(("1", "2"), (11, 12)), [identity])[0]
    assert vae.made.is_contiguous(memory_format=torch.channels_last)
    wanted = vae.decode(vae.latents.contiguous())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.5 / 255 + 1e-5)  # 256 levels
