"""Which of ComfyUI's internals this pack uses, as they are in 0.30.0, and what of them is other here.

ComfyUI promises none of them.  A newer version may go on working with some of them changed, so what
is found is said once in the log at the start, and stops nothing.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from functools import reduce

logger = logging.getLogger(__name__)

VERSION = "0.30.0"
# module:name, and the parameters of what can be called; None for anything else
INTERNALS: dict[str, str | None] = {
    "comfy.cli_args:args": None,
    "comfy.float:stochastic_rounding": "value dtype seed",
    "comfy.latent_formats:SDXL_Playground_2_5": "",
    "comfy.lora:calculate_weight": "patches weight key intermediate_dtype original_weights",
    "comfy.model_base:BaseModel.get_dtype_inference": "",
    "comfy.model_base:BaseModel.memory_required": "input_shape cond_shapes",
    "comfy.model_base:BaseModel.state_dict_for_saving": "unet_state_dict clip_state_dict vae_state_dict clip_vision_state_dict",
    "comfy.model_detection:model_config_from_unet": "state_dict unet_key_prefix use_base_if_no_match metadata",
    "comfy.model_detection:unet_prefix_from_state_dict": "state_dict",
    "comfy.model_management:OOM_EXCEPTION": None,
    "comfy.model_management:free_memory": "memory_required device keep_loaded for_dynamic pins_required ram_required",
    "comfy.model_management:get_free_memory": "dev torch_free_too",
    "comfy.model_management:get_torch_device": "",
    "comfy.model_management:get_total_memory": "dev torch_total_too",
    "comfy.model_management:is_device_cpu": "device",
    "comfy.model_management:is_oom": "e",
    "comfy.model_management:load_models_gpu": "models memory_required force_patch_weights minimum_memory_required force_full_load",
    "comfy.model_management:module_size": "module",
    "comfy.model_management:soft_empty_cache": "force",
    "comfy.model_management:text_encoder_offload_device": "",
    "comfy.model_management:throw_exception_if_processing_interrupted": "",
    "comfy.model_management:unet_dtype": "device model_params supported_dtypes weight_dtype",
    "comfy.model_management:unload_all_models": "",
    "comfy.model_management:unload_model_and_clones": "model unload_additional_models all_devices",
    "comfy.model_patcher:LowVramPatch": "key patches convert_func set_func",
    "comfy.model_patcher:ModelPatcher": "model load_device offload_device size weight_inplace_update",
    "comfy.model_patcher:ModelPatcher.clone": "disable_dynamic model_override force_deepcopy",
    "comfy.model_patcher:ModelPatcher.get_model_object": "name",
    "comfy.model_patcher:ModelPatcher.model_size": "",
    "comfy.model_patcher:ModelPatcher.patch_weight_to_device": "key device_to inplace_update return_weight force_cast",
    "comfy.model_sampling:CONST": "",
    "comfy.model_sampling:EDM": "",
    "comfy.model_sampling:ModelSamplingContinuousEDM": "model_config",
    "comfy.model_sampling:ModelSamplingDiscrete": "model_config zsnr",
    "comfy.model_sampling:V_PREDICTION": "",
    "comfy.ops:_quantized_apply": "module fn recurse",
    "comfy.ops:_quantized_weight_state_dict": "module sd prefix extra_quant_conf extra_quant_params",
    "comfy.ops:mixed_precision_ops": "quant_config compute_dtype full_precision_mm disabled",
    "comfy.ops:run_every_op": "",
    "comfy.patcher_extension:CallbacksMP": "",
    "comfy.sample:fix_empty_latent_channels": "model latent_image downscale_ratio_spacial downscale_ratio_temporal",
    "comfy.sample:prepare_noise": "latent_image seed noise_inds",
    "comfy.sample:sample_custom": "model noise cfg sampler sigmas positive negative latent_image noise_mask callback disable_pbar seed",
    "comfy.samplers:CFGGuider": "model_patcher",
    "comfy.samplers:CFGGuider.sample": "noise latent_image sampler sigmas denoise_mask callback disable_pbar seed",
    "comfy.samplers:CFGGuider.set_cfg": "cfg",
    "comfy.samplers:CFGGuider.set_conds": "positive negative",
    "comfy.samplers:KSAMPLER": "sampler_function extra_options inpaint_options",
    "comfy.samplers:SCHEDULER_NAMES": None,
    "comfy.samplers:Sampler": "",
    "comfy.samplers:calculate_sigmas": "model_sampling scheduler_name steps",
    "comfy.sd:CLIP.clone": "disable_dynamic",
    "comfy.sd:CLIP.encode_from_tokens_scheduled": "tokens unprojected add_dict show_pbar",
    "comfy.sd:CLIP.load_model": "tokens",
    "comfy.sd:CLIP.state_dict_for_saving": "",
    "comfy.sd:CLIP.tokenize": "text return_word_ids **kwargs",
    "comfy.sd:VAE.decode": "samples_in vae_options",
    "comfy.sd:VAE.get_sd": "",
    "comfy.sd:load_checkpoint_clip_patcher": "ckpt_path embedding_directory model_options te_model_options disable_dynamic",
    "comfy.sd:load_checkpoint_vae_patcher": "ckpt_path embedding_directory model_options te_model_options disable_dynamic",
    "comfy.sd:load_diffusion_model_state_dict": "sd model_options metadata disable_dynamic",
    "comfy.sd:load_state_dict_guess_config": "sd output_vae output_clip output_clipvision embedding_directory output_model model_options te_model_options metadata disable_dynamic",
    "comfy.utils:PROGRESS_BAR_ENABLED": None,
    "comfy.utils:ProgressBar": "total node_id",
    "comfy.utils:calculate_parameters": "sd prefix",
    "comfy.utils:load_torch_file": "ckpt safe_load device return_metadata",
    "comfy.utils:save_torch_file": "sd ckpt metadata",
    "comfy.utils:weight_dtype": "sd prefix",
    "comfy_execution.utils:get_executing_context": "",
    "comfy_kitchen.tensor:BaseLayoutParams": "scale orig_dtype orig_shape",
    "comfy_kitchen.tensor:QuantizedLayout": "",
    "comfy_kitchen.tensor:QuantizedTensor": "qdata layout_cls params",
    "comfy_kitchen.tensor:dequantize_args": "args",
    "comfy_kitchen.tensor:get_layout_class": "name",
    "comfy_kitchen.tensor:register_layout_class": "name cls",
    "comfy_kitchen.tensor:register_layout_op": "torch_op layout_cls",
    "comfyui_version:__version__": None,
    "folder_paths:add_model_folder_path": "folder_name full_folder_path is_default",
    "folder_paths:get_filename_list": "folder_name",
    "folder_paths:get_folder_paths": "folder_name",
    "folder_paths:get_full_path": "folder_name filename",
    "folder_paths:get_input_directory": "",
    "folder_paths:get_output_directory": "",
    "folder_paths:get_save_image_path": "filename_prefix output_dir image_width image_height",
    "folder_paths:get_temp_directory": "",
    "folder_paths:get_user_directory": "",
    "folder_paths:models_dir": None,
    "latent_preview:prepare_callback": "model steps x0_output_dict",
    "server:PromptServer": "loop",
}
_EMPTY = inspect.Parameter.empty
_MANY = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def differences() -> list[str]:
    """What is missing here or takes other parameters than in ``VERSION``, one line each.

    More parameters at the end, with a default, are no difference.
    """
    lines = (difference(name, known) for name, known in INTERNALS.items())
    return [line for line in lines if line]


def difference(name: str, known: str | None) -> str:
    """How the internal ``name`` differs from what is ``known`` of its parameters; "" if it does not."""
    module, _, path = name.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except AttributeError:
        return f"{name} is missing"
    except Exception as error:  # a module may raise anything while it is imported
        return f"{module} can't be imported ({type(error).__name__})"
    if known is None:
        return ""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return f"{name} can't be called any more"
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    names = [_MANY.get(p.kind, "") + p.name for p in parameters]
    wanted = known.split()
    more = parameters[len(wanted) :]
    if names[: len(wanted)] == wanted and all(
        p.default is not _EMPTY or p.kind in _MANY for p in more
    ):
        return ""
    return f"{name}({', '.join(names)}) took ({', '.join(wanted)})"


def report() -> list[str]:
    """Log in one line whether the host's internals are as known; :func:`differences`."""
    found = differences()
    version = getattr(importlib.import_module("comfyui_version"), "__version__", "unknown")
    if found:
        logger.warning(
            "ComfyUI-QSched: %d of %d internals of ComfyUI %s are not as in %s, and what needs them may "
            "fail: %s",
            len(found), len(INTERNALS), version, VERSION, "; ".join(found),
        )  # fmt: skip
    else:
        logger.info(
            "ComfyUI-QSched: all %d internals of ComfyUI %s are as known", len(INTERNALS), version
        )
    return found
